"""What was right when others' bug reports were replayed, and is to stay so."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from test_parallel import assert_equal_runs, group, run, run_all, shared_group  # noqa: F401  two are fixtures
from test_training import metrics, stop_at


def test_a_run_of_accumulated_gradients_stopped_at_any_step_equals_one_never_stopped(
    run_train, workshop, monkeypatch
):
    flags = ("--stage", "7", "--steps", "6", "--eval-every", "2", "--log-every", "1", "--warmup-steps", "2")
    flags += ("--micro-batch-size", "1", "--model.dropout", "0.1")
    assert run_train(*flags, "--out", "whole") == 0
    whole = load_file("whole/last/model.safetensors")
    for step in range(1, 6):
        out = f"stopped-at-{step}"
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            assert run_train(*flags, "--out", out) > 128
        assert metrics(out) == metrics("whole")[:step]
        assert run_train("--resume", "--out", out) == 0
        assert metrics(out) == metrics("whole")
        stopped = load_file(f"{out}/last/model.safetensors")
        assert all(torch.equal(whole[name], stopped[name]) for name in whole)


@pytest.mark.parametrize("name", ["stage6_moe", "stage7_mla_mtp"])
def test_experts_that_no_token_chose_do_not_stop_or_change_training_in_two_processes(name, group):  # noqa: F811
    flags = (
        "--stage",
        name,
        "--model.n-routed-experts",
        "16",
        "--batch-size",
        "2",
        "--model.block-size",
        "4",
    )
    assert run(*flags, "--out", "one")[0] == 0
    run_all(group, *flags, "--out", "two")
    ours, theirs = metrics("two"), metrics("one")
    counts = itertools.chain.from_iterable(itertools.chain(*(line["expert_tokens"] for line in ours)))
    assert 0 in counts
    assert_equal_runs(ours, theirs, 1e-4)
