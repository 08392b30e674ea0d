"""Measures the time of a training step of stages 7a and 7: python -m benchmarks.mla

Writes the part "mla" of results/results.json; then `python -m lab.pages.lessons` writes the table into the
lesson. Decoding, and drafting, are measured by benchmarks/ideas/latents.py and drafts.py.
"""

import json
import sys
from dataclasses import dataclass

import torch

from benchmarks import moe
from lab import cli, device, stages
from lab.pages import lessons
from lab.storage import runs

CPU = torch.device("cpu")


@dataclass
class Settings:
    """Measures the training speed of stages 7a and 7."""

    rounds: int = 7
    """Number of interleaved measurements; medians are reported."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    device.prepare(CPU)
    results = lessons.read_results()
    results["mla"] = {
        "training": training(settings.rounds),
        "rounds": settings.rounds,
        "machine": runs.machine(CPU),
    }
    runs.write_json(lessons.RESULTS, results)
    print(json.dumps(results["mla"], indent=2))


def training(rounds: int) -> dict:
    """Training speed as a multiple of stage 6's."""
    dtype = device.choose_dtype("auto", CPU)
    stage6_step = moe.training_step("stage6_moe", dtype)
    return {
        f"stage {stages.number(name)}": moe.ratio(rounds, moe.training_step(name, dtype), stage6_step)
        for name in ("stage7a_mla", "stage7_mla_mtp")
    }


if __name__ == "__main__":
    cli.run(main)
