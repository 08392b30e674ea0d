"""Measures up to which context attention written out is faster than SDPA: python -m benchmarks.attention

Writes the section "attention" of results/results.json. Afterwards `python -m lab.pages.lessons` writes the
table into stage 5's lesson. (benchmarks/ideas/long_contexts.py measures long contexts.)
"""

import sys
from dataclasses import dataclass
from functools import partial

import torch

from lab import attention, cli, device, stages
from lab.comparison import timing
from lab.pages import lessons
from lab.storage import runs
from lab.training import optim, presets

CPU = torch.device("cpu")
CONTEXTS = (64, 128, 256, 512, 1024, 2048)


@dataclass
class Settings:
    """Measures a training step with SDPA and with attention written out."""

    rounds: int = 22
    """Number of interleaved measurements; medians are reported."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    device.prepare(CPU)
    dtypes = ("float32", "bfloat16")
    crossing = {dtype: crossover(getattr(torch, dtype), settings.rounds) for dtype in dtypes}
    results = lessons.read_results()
    results["attention"] = {
        "crossover": crossing,
        "rounds": settings.rounds,
        "machine": runs.machine(CPU),
    }
    runs.write_json(lessons.RESULTS, results)


def crossover(dtype: torch.dtype, rounds: int) -> dict[int, float]:
    """By context length: the time of a training step with SDPA divided by that with explicit attention.

    Uses two layers of the laptop preset, and about the same number of tokens at each context length. The two
    are interleaved; the ratio is a median.
    """
    stage, ratios = stages.load("stage5_flash"), {}
    autocast = device.autocast(CPU, dtype)

    def step(kernel, model, idx):
        attention.use(kernel, stage, model.config, CPU)
        optim.accumulate_gradients(model, idx, idx, len(idx), autocast)
        model.zero_grad()

    for context in CONTEXTS:
        sizes = presets.PRESETS["laptop"]["model"] | {"block_size": context, "n_layer": 2}
        model = stage.GPT(stage.GPTConfig(vocab_size=65, **sizes))
        idx = torch.randint(65, (max(1, 1024 // context), context))
        steps = {kernel: partial(step, kernel, model, idx) for kernel in ("sdpa", "explicit")}
        seconds = timing.in_turn(steps, rounds, CPU, warm_ups=3)
        ratios[context] = timing.median_ratio(seconds["sdpa"], seconds["explicit"])
    return ratios


if __name__ == "__main__":
    cli.run(main)
