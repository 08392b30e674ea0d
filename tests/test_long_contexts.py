"""Where FlashAttention pays: the measurement, at tiny sizes or with made-up figures."""

import json
import sys
import time

import pytest

from benchmarks.ideas import long_contexts
from lab.comparison import isolated, timing
from lab.errors import UserError
from lab.pages import lessons

GIB = 2**30


def made(context, bytes_of):
    """A measurement at this context whose process needs bytes_of(context), and 1 ms a token."""
    return {"tokens_per_second": 1000, "peak_memory": bytes_of(context), "memory_before": 100 * 2**20}


def quadratic(context):
    return 300 * 2**20 + 100 * context**2


def linear(context):
    return 300 * 2**20 + 20_000 * context


@pytest.fixture
def measured(monkeypatch):
    """Stands in for the processes: one variant needs much memory, the others little. Lists what was asked."""
    asked = []

    def measure(stage, what, context, attention_kernel, **options):
        asked.append((stage, attention_kernel, what, context))
        need = quadratic if stage == "4" else linear
        if need(context) > 6 * GIB:
            return {"error": "there is not enough memory for 9 GB more"}
        return made(context, need)

    monkeypatch.setattr(isolated, "measure", measure)
    return asked


def test_the_longest_context_is_searched_by_measuring_to_the_precision_that_is_stated(measured):
    settings = long_contexts.Settings(rounds=2, contexts=(1024, 4096, 16384), precision=64)
    found = long_contexts.by_context("training", settings)["stage 4"]
    assert "error" in found[16384]
    measured.clear()
    longest = long_contexts.longest_context("stage 4", found, settings)
    assert longest["measured"] and longest["context"] % 64 == 0
    assert quadratic(longest["context"]) <= 4 * GIB < quadratic(longest["context"] + 64)
    for context in (longest["context"], longest["context"] + 64):
        assert longest["tried"][context] == quadratic(context)
        assert measured.count(("4", "auto", "training", context)) == 2


def test_what_was_not_searched_is_called_extrapolated(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(lessons, "IDEAS", tmp_path)
    settings = long_contexts.Settings(rounds=1, contexts=(1024, 4096, 16384))
    found = {what: long_contexts.by_context(what, settings) for what in long_contexts.KINDS}
    longest = {
        name: long_contexts.longest_context(name, found["training"][name], settings)
        for name in long_contexts.VARIANTS
    }
    assert not longest["stage 5"]["measured"]
    assert longest["stage 5"]["context"] == pytest.approx((4 * GIB - 300 * 2**20) / 20_000, abs=1)
    long_contexts.write(found, longest, settings)
    rows = [line.strip("| ").split(" | ") for line in lessons.where_it_pays("long_contexts").splitlines()[7:]]
    explicit, flash = rows[0], rows[1]
    assert explicit[:4] == ["a training step, stage 4", "1.02 s, 300 MiB", "4.10 s, 1,800 MiB", "too large"]
    assert explicit[4] == f"{longest['stage 4']['context']:,}"
    assert flash[4] == "about 199,000 (extrapolated)"
    assert (tmp_path / "long_contexts.png").exists() and (tmp_path / "long_contexts-dark.png").exists()
    assert json.loads((tmp_path / "long_contexts.json").read_text())["longest"]["stage 4"]["tried"]


def test_the_variants_take_turns_and_nothing_longer_is_tried_after_what_does_not_fit(measured):
    settings = long_contexts.Settings(rounds=2, contexts=(1024, 16384, 32768))
    long_contexts.by_context("forward", settings)
    kinds = [(stage, kernel, context) for stage, kernel, _, context in measured]
    three = [("4", "auto", 1024), ("5", "auto", 1024), ("5", "tiled", 1024)]
    assert kinds[:6] == three * 2
    assert kinds.count(("4", "auto", 16384)) == 1 and ("4", "auto", 32768) not in kinds


def test_an_error_of_another_kind_is_no_lack_of_memory(monkeypatch):
    monkeypatch.setattr(isolated, "measure", lambda **settings: {"error": "ImportError: no torch"})
    with pytest.raises(UserError, match="ImportError: no torch"):
        long_contexts.one("stage 4", "training", 1024)


@pytest.mark.parametrize("what", ["forward", "training"])
def test_a_pass_is_measured_with_the_clock_that_is_asked(what, monkeypatch, capsys):
    clocks, seconds_of = [], timing.seconds_of

    def watched(*arguments, clock, **options):
        clocks.append(clock)
        return seconds_of(*arguments, clock=clock, **options)

    monkeypatch.setattr(timing, "seconds_of", watched)
    sizes = json.dumps({"vocab_size": 65, "n_layer": 1, "n_head": 2, "n_embd": 8})
    for clock in ("wall", "processor"):
        flags = {"stage": "5", "what": what, "context": 8, "steps": 1, "clock": clock, "model": sizes}
        flags |= {"device": "cpu", "dtype": "float32"}
        argv = [f"--{name}={value}" for name, value in flags.items()]
        monkeypatch.setattr(sys, "argv", ["isolated", *argv])
        isolated.main()
        assert json.loads(capsys.readouterr().out)["tokens_per_second"] > 0
    assert clocks == [None, time.process_time]
