"""Measures explicit attention, SDPA and tiled.py: python -m benchmarks.attention

Writes the section "attention" of results/results.json and the figure in stage 5's lesson. Afterwards
`python -m lab.pages.lessons` writes the tables into the pages.
"""

import statistics
import sys
from dataclasses import dataclass
from functools import partial

import torch

from lab import attention, cli, device, stages
from lab.comparison import isolated, timing
from lab.pages import lessons
from lab.storage import runs
from lab.training import optim, presets, run_plots

CPU = torch.device("cpu")
CONTEXTS = [256, 512, 1024, 2048, 4096]
VARIANTS = {
    "stage 4": ("stage4_gqa", "auto"),
    "stage 5": ("stage5_flash", "auto"),
    "tiled.py": ("stage5_flash", "tiled"),
}
PICTURE = stages.ROOT / "stage5_flash" / "context.png"


@dataclass
class Settings:
    """Measures attention at several context lengths."""

    rounds: int = 3
    """Number of interleaved measurements; medians are reported."""


def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    device.prepare(CPU)
    crossing = {dtype: crossover(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    by_context = against_context(settings.rounds)
    results = lessons.read_results()
    results["attention"] = {
        "crossover": crossing,
        "by_context": by_context,
        "rounds": settings.rounds,
        "machine": runs.machine(CPU),
    }
    runs.write_json(lessons.RESULTS, results)
    run_plots.against_context(by_context, CONTEXTS, PICTURE)


def crossover(dtype: torch.dtype) -> dict[int, float]:
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

    for context in (64, 128, 256, 512, 1024, 2048):
        sizes = presets.PRESETS["laptop"]["model"] | {"block_size": context, "n_layer": 2}
        model = stage.GPT(stage.GPTConfig(vocab_size=65, **sizes))
        idx = torch.randint(65, (max(1, 1024 // context), context))
        steps = {kernel: partial(step, kernel, model, idx) for kernel in ("sdpa", "explicit")}
        seconds = timing.in_turn(steps, 22, CPU, warm_ups=3)
        ratios[context] = timing.median_ratio(seconds["sdpa"], seconds["explicit"])
    return ratios


def against_context(rounds: int) -> dict[str, dict]:
    """By variant and context length: training tokens per second, and the increase in peak memory in bytes."""
    measured = {
        name: {"tokens_per_second": {}, "memory": {}} | {"stage": stage}
        for name, (stage, _) in VARIANTS.items()
    }
    for context in CONTEXTS:
        runs_of = {name: [] for name in VARIANTS}
        for _ in range(rounds):
            for name, (stage, kernel) in VARIANTS.items():
                made = isolated.measure(stage=stage, context=context, attention_kernel=kernel, steps=3)
                if "error" in made:
                    print(f"{name} at {context}: {made['error']}", file=sys.stderr)
                else:
                    runs_of[name].append(made)
        for name, made in runs_of.items():
            if made:
                speeds = [one["tokens_per_second"] for one in made]
                memory = [one["peak_memory"] - one["memory_before"] for one in made]
                measured[name]["tokens_per_second"][context] = statistics.median(speeds)
                measured[name]["memory"][context] = statistics.median(memory)
    return measured


if __name__ == "__main__":
    cli.run(main)
