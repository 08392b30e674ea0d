"""benchmarks.step_profile: the kinds of a training step's operations, and the table of their shares."""

import json
from pathlib import Path

import pytest
from conftest import call

from benchmarks import step_profile
from lab.pages import lessons


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::mm", "matrix products"),
        ("aten::topk", "choosing experts and tokens"),  # not aten::to
        ("aten::to", "copies and conversions"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::native_layer_norm_backward", "LayerNorm, activations, softmax"),
        ("aten::view", step_profile.REST),
    ],
)
def test_each_operation_is_of_one_kind(operation, kind):
    assert step_profile.kind_of(operation) == kind


def test_shares_add_up_and_a_mixture_starts_more_operations(workshop, monkeypatch, capsys):
    monkeypatch.setattr(lessons, "RESULTS", Path("results.json"))
    Path("results.json").write_text("{}")
    flags = ("--stages", "4,6", "--steps", "1", "--rounds", "1")
    assert call(monkeypatch, step_profile, *flags) == 0
    dense, mixture = json.loads(Path("results.json").read_text())["step_profile"]["stages"].values()
    for one in (dense, mixture):
        assert sum(one["shares"].values()) == pytest.approx(1) and one["milliseconds"] > 1
        assert one["shares"]["matrix products"] > 0.1
    assert dense["shares"]["choosing experts and tokens"] < mixture["shares"]["choosing experts and tokens"]
    assert dense["operations"] < mixture["operations"]
    assert "| | 4 gqa | 6 moe |" in capsys.readouterr().out
