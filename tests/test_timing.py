"""How calls are timed."""

import pytest
import torch

from lab.comparison import timing

CPU = torch.device("cpu")


@pytest.fixture
def calls_of(monkeypatch):
    """Makes a call that takes these numbers of seconds in turn, by a clock that nothing else moves."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def make(*seconds):
        left = iter(seconds)

        def call():
            now[0] += next(left)

        return call

    return make


def test_calls_take_turns_and_the_first_rounds_do_not_count(calls_of):
    order, a, b = [], calls_of(9, 1, 2), calls_of(8, 3, 4)
    calls = {"a": lambda: order.append("a") or a(), "b": lambda: order.append("b") or b()}
    assert timing.in_turn(calls, 2, CPU, warm_ups=1) == {"a": [1, 2], "b": [3, 4]}
    assert order == ["a", "b"] * 3


def test_the_first_calls_do_not_count(calls_of):
    assert timing.seconds_of(calls_of(9, 8, 1, 2, 3), 3, CPU, warm_ups=2) == [1, 2, 3]


def test_another_clock_can_be_asked():
    """Here one that a call moves by 3; the wall clock would say less."""
    now = [0.0]

    def call():
        now[0] += 3

    assert timing.seconds_of(call, 2, CPU, clock=lambda: now[0]) == [3, 3]
    assert timing.in_turn({"a": call}, 2, CPU, clock=lambda: now[0]) == {"a": [3, 3]}


def test_no_further_call_is_made_after_the_limit(calls_of):
    assert timing.seconds_of(calls_of(2, 2, 2), 100, CPU, limit=3) == [2, 2]


def test_a_ratio_is_that_of_neighbours_in_time():
    """The machine is ten times as slow in the second round, for both."""
    assert timing.median_ratio([2, 20, 2], [1, 10, 4]) == pytest.approx(2)
