"""Stage 3: SwiGLU beside GELU and ReLU² with as many parameters, each at its best learning rate.

python -m benchmarks.ideas.gates trains models that differ in their MLP alone: from the preset's rate on, it
doubles or halves the rate until the best lies between two others. It reuses the runs of
`python compare.py --tune`. Writes results/ideas/gates.json and its picture, and into my/ the MLPs that the
course does not have.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ideas, moe
from lab import cli, device, stages
from lab.comparison import report, spread, timing
from lab.storage import runs
from lab.training import cost, run_plots

PLAIN = '''class MLP(nn.Module):
    """Two matrices with {name} between them. They have as many weights as the three of SwiGLU."""

    def __init__(self, config):
        super().__init__()
        width = 3 * config.intermediate_size // 2
        self.up_proj = nn.Linear(config.n_embd, width, bias=False)
        self.down_proj = nn.Linear(width, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj({activation})


'''
ACTIVATIONS = {
    "GELU": 'F.gelu(self.up_proj(x), approximate="tanh")',
    "ReLU²": "F.relu(self.up_proj(x)).square()",
}
FILES = {"GELU": "gates_gelu.py", "ReLU²": "gates_relu2.py"}
COLORS = {"GELU": "#E69F00", "ReLU²": "#CC79A7", "SwiGLU": run_plots.stage_color("stage3_swiglu")}


@dataclass
class Settings:
    """Trains stage 3 with SwiGLU, GELU and ReLU² and compares their losses and speeds."""

    steps: int = 2000
    """Optimizer steps of a run."""
    rate: float = 1e-3
    """The first learning rate to try."""
    choosing_seeds: int = 2
    """Seeds whose mean loss decides which rate is the best."""
    seeds: int = 3
    """Seeds at the best rate."""
    rounds: int = 30
    """Interleaved measurements of a training step; medians are reported."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    print("This takes about 30 minutes on one core, or 20 after compare.py --tune.")
    print("Finished runs are kept, so it can be interrupted.")
    device.prepare(ideas.CPU)
    mlps = {"SwiGLU": "stage3_swiglu"} | {name: write_variant(name) for name in ACTIVATIONS}
    measured = {name: losses(stage, settings) for name, stage in mlps.items()}
    dtype = device.choose_dtype("auto", ideas.CPU)
    steps = {name: moe.training_step(stage, dtype) for name, stage in mlps.items()}
    seconds = timing.in_turn(steps, settings.rounds, ideas.CPU, warm_ups=3)
    for name, of in measured.items():
        of["step_milliseconds"] = 1000 * statistics.median(seconds[name])
        of["time_relative_to_swiglu"] = timing.median_ratio(seconds[name], seconds["SwiGLU"])
        of["differs_from_swiglu"] = spread.means_differ(
            of["at_best"]["values"], measured["SwiGLU"]["at_best"]["values"]
        )
    rates = sorted({float(rate) for of in measured.values() for rate in of["tried"]})
    ideas.write(
        "gates",
        {"mlps": measured, "steps": settings.steps, "rounds": settings.rounds, "dtype": str(dtype)[6:]},
        [
            *("MLP", "parameters", "FLOPs per token", *map("rate {:g}".format, rates)),
            *(f"{settings.seeds} seeds at its best rate", "time of a step"),
        ],
        [row(name, of, rates) for name, of in measured.items()],
        lambda: picture(measured, rates),
        "The validation loss by learning rate for SwiGLU, GELU and ReLU²: an outlined point for each seed, "
        "and lines through the means.",
    )


def write_variant(name: str) -> str:
    """Writes my/<file>, stage 3 with another MLP, and returns the name of that stage."""
    model = stages.path("stage3_swiglu").read_text(encoding="utf-8")
    start, end = model.index("class MLP(nn.Module):"), model.index("class Block(nn.Module):")
    mlp = PLAIN.format(name=name, activation=ACTIVATIONS[name])
    stages.MY.mkdir(exist_ok=True)
    path = stages.MY / FILES[name]
    path.write_text(model[:start] + mlp + model[end:], encoding="utf-8")
    return f"my_{Path(FILES[name]).stem}"


def losses(stage: str, settings: Settings) -> dict:
    """The sizes of an MLP's model, and its final validation losses by rate and with all seeds at the best."""

    def run(rate: float, seed: int) -> tuple[Path, list[dict]]:
        flags = ["--stage", stage, "--lr", str(rate), "--min-lr", str(rate / 10)]
        flags += ["--seed", str(seed), "--steps", str(settings.steps)]
        return ideas.trained(f"gates-{stage}-{settings.steps}-steps-lr{rate:g}-seed{seed}", flags)

    def final_losses(rate: float, seeds: int) -> list[float]:
        return [run(rate, seed)[1][-1]["val_loss"] for seed in range(seeds)]

    def mean_loss(rate: float) -> float:
        return statistics.mean(final_losses(rate, settings.choosing_seeds))

    means = ideas.rates_around_the_best(mean_loss, settings.rate)
    best = min(means, key=means.get)
    tried = {f"{rate:g}": spread.summary(final_losses(rate, settings.choosing_seeds)) for rate in means}
    model, config = runs.load(run(best, 0)[0], "best", ideas.CPU)
    return {
        "parameters": config["parameters"],
        "flops_per_token": cost.flops_per_token(model),
        "tried": tried,
        "best_rate": f"{best:g}",
        "at_best": spread.summary(final_losses(best, settings.seeds)),
    }


def row(name: str, of: dict, rates: list[float]) -> list:
    """The line of an MLP in the table, with a column for each of the rates."""
    means = dict.fromkeys((f"{rate:g}" for rate in rates), "")
    means |= {rate: f"{summary['mean']:.3f}" for rate, summary in of["tried"].items()}
    means[of["best_rate"]] = f"**{means[of['best_rate']]}**"
    noise = "≈ " if name != "SwiGLU" and of["differs_from_swiglu"] is False else ""
    return [
        name,
        f"{of['parameters']:,}",
        f"{of['flops_per_token'] / 1e6:.2f} M",
        *means.values(),
        noise + report.with_std(of["at_best"], 3),
        f"{of['time_relative_to_swiglu']:.2f}×",
    ]


def picture(measured: dict, rates: list[float]):
    """The losses against the learning rate."""
    figure, axes = run_plots.new_figure(7, 4.2)
    for (name, of), marker in zip(measured.items(), "o^s", strict=False):
        by_rate = of["tried"] | {of["best_rate"]: of["at_best"]}
        means = {float(rate): summary["mean"] for rate, summary in by_rate.items()}
        axes.plot(means.keys(), means.values(), color=COLORS[name], marker=marker, linewidth=1.6, label=name)
        for rate, summary in by_rate.items():
            for loss in summary["values"]:
                axes.plot(float(rate), loss, marker, color=COLORS[name], markersize=5, markerfacecolor="none")
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


if __name__ == "__main__":
    cli.run(main)
