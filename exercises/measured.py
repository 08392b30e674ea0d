"""Answers to predictions: from what was measured (results/results.json), and by counting."""

import json

import torch

from lab import stages
from lab.training import cost

CHANGES = ("lower", "higher", "no significant difference")
"""How the loss of a stage may compare with that of the stage before."""


def loss_change(name: str) -> str:
    """How the validation loss of a stage differs from the stage before: one of CHANGES."""
    rows = json.loads((stages.ROOT / "results/results.json").read_text(encoding="utf-8"))["stages"]
    row = rows[name]
    if not row["differs"]["val_loss"]:
        return CHANGES[2]
    lower = row["val_loss"]["mean"] < rows[row["from"]]["val_loss"]["mean"]
    return CHANGES[0] if lower else CHANGES[1]


def parameters_saved(before: str, after: str) -> int:
    """How many parameters a stage has fewer than another, in GPT-2's size."""
    counts = []
    for name in (before, after):
        module = stages.load(name)
        with torch.device("meta"):
            counts.append(cost.parameters(module.GPT(module.GPTConfig())))
    return counts[0] - counts[1]
