"""Stage 3: SwiGLU beside GELU and ReLU² with as many parameters, each at its best learning rate.

python -m benchmarks.ideas.gates trains models that differ in their MLP alone, and writes
results/ideas/gates.json and its picture. It writes the MLPs that the course does not have into my/.
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
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Learning rates to try."""
    choosing_seeds: int = 2
    """Seeds whose mean loss decides which rate is the best."""
    seeds: int = 3
    """Seeds at the best rate."""
    rounds: int = 30
    """Interleaved measurements of a training step; medians are reported."""


def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    print("This takes about 50 minutes on one core. Finished runs are kept, so it can be interrupted.")
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
    ideas.write(
        "gates",
        {"mlps": measured, "steps": settings.steps, "rounds": settings.rounds, "dtype": str(dtype)[6:]},
        [
            *("MLP", "parameters", "FLOPs per token", *map("rate {:g}".format, settings.rates)),
            *(f"{settings.seeds} seeds at its best rate", "time of a step"),
        ],
        [row(name, of) for name, of in measured.items()],
        lambda: picture(measured),
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
        flags = ["--stage", stage, "--lr", f"{rate:g}", "--seed", str(seed), "--steps", str(settings.steps)]
        flags += ["--eval-every", str(settings.steps)]  # only the last loss is compared
        return ideas.trained(f"gates-{stage}-{settings.steps}-steps-lr{rate:g}-seed{seed}", flags)

    def loss(rate: float, seed: int) -> float:
        return run(rate, seed)[1][-1]["val_loss"]

    tried = {rate: [loss(rate, seed) for seed in range(settings.choosing_seeds)] for rate in settings.rates}
    best = min(tried, key=lambda rate: statistics.mean(tried[rate]))
    chosen = tried[best] + [loss(best, seed) for seed in range(settings.choosing_seeds, settings.seeds)]
    model, config = runs.load(run(best, 0)[0], "best", ideas.CPU)
    return {
        "parameters": config["parameters"],
        "flops_per_token": cost.flops_per_token(model),
        "tried": {f"{rate:g}": spread.summary(values) for rate, values in tried.items()},
        "best_rate": f"{best:g}",
        "at_best": spread.summary(chosen),
    }


def row(name: str, of: dict) -> list:
    """The line of an MLP in the table."""
    means = {rate: f"{summary['mean']:.3f}" for rate, summary in of["tried"].items()}
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


def picture(measured: dict):
    """The losses against the learning rate."""
    figure, axes = run_plots.new_figure(7, 4.2)
    rates = [float(rate) for rate in measured["SwiGLU"]["tried"]]
    for (name, of), marker in zip(measured.items(), "o^s", strict=False):
        by_rate = of["tried"] | {of["best_rate"]: of["at_best"]}
        means = [summary["mean"] for summary in by_rate.values()]
        axes.plot(rates, means, color=COLORS[name], marker=marker, linewidth=1.6, label=name)
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
