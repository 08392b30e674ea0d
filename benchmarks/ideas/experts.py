"""Stage 6 where it pays: 8, 32 and 64 experts beside a dense model, at equal active parameters.

python -m benchmarks.ideas.experts trains the missing runs in runs/ideas/: two layers of width 64 on PyCode,
which is so long that a run reads a seventh of it. It takes about 55 minutes of one core.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import ideas
from lab import cli, device, stages
from lab.comparison import report, spread, timing
from lab.storage import runs
from lab.training import optim, run_plots

CPU = torch.device("cpu")
# By name: the stage, what differs from its defaults, and the number of steps as a multiple of --steps.
DENSE = "dense"
LONGER = {"dense, 1.5 × the steps": ":", "dense, 2 × the steps": "--"}  # and how their lines are drawn
MODELS = {
    DENSE: (["--stage", "5"], 1),
    "dense, 1.5 × the steps": (["--stage", "5"], 1.5),
    "dense, 2 × the steps": (["--stage", "5"], 2),
    "8 experts": (["--stage", "6"], 1),
    "32 experts": (["--stage", "6", "--model.n-routed-experts", "32"], 1),
    "64 experts": (["--stage", "6", "--model.n-routed-experts", "64"], 1),
}
MIXTURES = ["8 experts", "32 experts", "64 experts"]
DATA = "pycode"
SIZES = ["--model.n-layer", "2", "--model.n-head", "2", "--model.n-embd", "64"]
SCHEDULE = ["--batch-size", "32", "--dtype", "float32", "--eval-tokens", "131072"]
FIRST_RATE = 0.003  # a model gets the best rate that one seed finds from here: they differ in it
COLORS = dict(zip(MODELS, ["#888888", "#888888", "#888888", "#56B4E9", "#E69F00", "#CC79A7"], strict=True))


@dataclass
class Settings:
    """Measures mixtures of 8, 32 and 64 experts beside a dense model, on PyCode."""

    seeds: int = 3
    """Number of runs of each model at its best learning rate."""
    steps: int = 1500
    """Optimizer steps of each run, of 2048 tokens."""
    rounds: int = 100
    """Number of interleaved measurements of a training step; medians are reported."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    device.prepare(CPU)
    tried = {name: try_rates(name, settings.steps) for name in (DENSE, *MIXTURES)}
    rates = {name: min(losses, key=losses.get) for name, losses in tried.items()}
    rates |= dict.fromkeys(LONGER, rates[DENSE])
    seeds = range(settings.seeds)
    found = {name: [train(name, seed, rates[name], settings.steps) for seed in seeds] for name in MODELS}
    measured = measure(found, settings.rounds)
    ideas.write(
        "experts",
        {"models": measured, "rates": rates, "tried": tried, "settings": vars(settings)},
        ["", "parameters (active)", "best rate", "validation loss", "time of a step", "minutes of training"],
        rows_of_losses(measured, rates),
        lambda: draw_losses(measured),
        "Validation loss of a dense model and of mixtures of 8, 32 and 64 experts: against tokens, against "
        "minutes of training, and after the last step against the number of parameters",
    )


def train(name: str, seed: int, rate: float, steps: int) -> tuple[Path, list[dict]]:
    """The folder and the metrics of a run, which is trained if it is missing.

    steps: before they are multiplied by the model's own factor.
    """
    flags, times = MODELS[name]
    flags = [*flags, "--data", DATA, "--seed", str(seed), "--steps", str(round(steps * times)), *SIZES]
    flags += ["--lr", str(rate), "--min-lr", str(rate / 10), *SCHEDULE]
    flags += ["--eval-every", str(max(1, steps // 5))]
    plain = name.replace(", ", "-").replace(" × ", "-").replace(" ", "-")
    return ideas.trained(f"experts-{plain}-{steps}-steps-{rate}-seed{seed}", flags)


def try_rates(name: str, steps: int) -> dict[float, float]:
    """The final validation losses of a model's runs with seed 0, by learning rate."""
    return ideas.rates_around_the_best(
        lambda rate: train(name, 0, rate, steps)[1][-1]["val_loss"], FIRST_RATE
    )


def measure(found: dict[str, list[tuple[Path, list[dict]]]], rounds: int) -> dict[str, dict]:
    """What is measured of each model: found has the folder and the metrics of its runs, by seed."""
    steps = {name: training_step(of_seeds[0][0]) for name, of_seeds in found.items() if name not in LONGER}
    seconds = timing.in_turn(steps, rounds, CPU, warm_ups=2)
    seconds |= dict.fromkeys(LONGER, seconds[DENSE])
    final = {name: [metrics[-1]["val_loss"] for _, metrics in of_seeds] for name, of_seeds in found.items()}
    measured = {}
    for name, of_seeds in found.items():
        evaluated = [[r for r in metrics if "val_loss" in r] for _, metrics in of_seeds]
        config = runs.read_config(of_seeds[0][0])
        measured[name] = {
            "parameters": config["parameters"],
            "active_parameters": config["active_parameters"],
            "seconds_per_step": statistics.median(seconds[name]),
            "of_the_dense_step": timing.median_ratio(seconds[name], seconds[DENSE]),
            "steps": [record["step"] for record in evaluated[0]],
            "tokens": [record["tokens"] for record in evaluated[0]],
            "val_losses": [[record["val_loss"] for record in metrics] for metrics in evaluated],
            "final": spread.summary(final[name]),
            "differs_from_dense": spread.means_differ(final[name], final[DENSE]),
            "trained_at": config["machine"]["commit"],
        }
    return measured


def training_step(folder: Path):
    """A function that makes training steps like those of a run, with new weights and random characters."""
    config = runs.read_config(folder)
    model = stages.load(config["stage"]).GPT(runs.model_config(folder, config))
    optimizer, autocast = optim.adamw(model, 1e-3, 0.1, (0.9, 0.99)), device.autocast(CPU, torch.float32)
    size = config["settings"]["batch_size"]
    idx = torch.randint(model.config.vocab_size, (size, model.config.block_size))

    def step():
        optim.accumulate_gradients(model, idx, idx, size, autocast)
        optim.update(model, optimizer, 1e-3, 1.0)
        if hasattr(model, "after_step"):
            model.after_step()

    return step


def rows_of_losses(measured: dict[str, dict], rates: dict[str, float]) -> list[list]:
    """The table's rows. The minutes are those of the dense model's step, times the ratio of the steps."""
    rows = []
    for name, row in measured.items():
        sizes = f"{row['parameters'] / 1e6:.2f} M ({row['active_parameters'] / 1e6:.3f} M)"
        noise = "≈ " if row["differs_from_dense"] is False and name != DENSE else ""
        loss = noise + report.with_std(row["final"], 3)
        step = f"{1000 * measured[DENSE]['seconds_per_step'] * row['of_the_dense_step']:.0f} ms"
        rows.append([name, sizes, rates[name], loss, step, f"{minutes(measured, name)[-1]:.1f}"])
    return rows


def minutes(measured: dict[str, dict], name: str) -> np.ndarray:
    """Minutes of training until each evaluation, from the time of a step on a machine without other work."""
    row = measured[name]
    step = measured[DENSE]["seconds_per_step"] * row["of_the_dense_step"]
    return np.array(row["steps"]) * step / 60


def draw_losses(measured: dict[str, dict]):
    """Loss against tokens and minutes, and in the end against parameters, each ± 1 standard deviation."""
    figure, (by_tokens, by_minutes, by_parameters) = run_plots.new_figure(13, 4.6, columns=3)
    for name, row in measured.items():
        color, dash = COLORS[name], LONGER.get(name, "-")
        losses = np.array(row["val_losses"])  # (seeds, evaluations)
        mean, std = losses.mean(axis=0), losses.std(axis=0, ddof=min(1, len(losses) - 1))
        scales = {by_tokens: np.array(row["tokens"]) / 1e6, by_minutes: minutes(measured, name)}
        for panel, x in scales.items():
            panel.plot(x, mean, color=color, linestyle=dash, marker="o", markersize=3, label=name)
            panel.fill_between(x, mean - std, mean + std, color=color, alpha=0.25, linewidth=0)
        marker = "s" if name in LONGER else "o"
        size = row["parameters"] / 1e6
        by_parameters.errorbar(size, mean[-1], std[-1], color=color, capsize=4, marker=marker)
    by_tokens.set_ylabel("validation loss (nats per character)")
    by_tokens.set_xlabel("characters trained on (millions)")
    by_minutes.set_xlabel("minutes of training")
    by_parameters.set_xlabel("parameters in all (millions)")
    by_parameters.set_xscale("log")
    sizes = sorted({row["parameters"] / 1e6 for row in measured.values()})
    by_parameters.set_xticks(sizes, [f"{size:.2f}" for size in sizes])
    by_parameters.minorticks_off()
    by_parameters.set_ylabel("validation loss after the last step")
    for panel in (by_tokens, by_minutes, by_parameters):
        panel.grid(alpha=0.3)
    by_tokens.legend(fontsize=9)
    return figure


if __name__ == "__main__":
    cli.run(main)
