"""How much of a stage's gain is a learning rate that suits it, with AdamW and with Muon.

python -m benchmarks.ideas.rates trains the laptop preset with several learning rates and seeds: from an
optimizer's first rate on, it doubles or halves until the best lies between two others. It reuses the runs of
`python compare.py --tune`. Writes results/ideas/rates.json and its picture.
"""

import sys
from dataclasses import dataclass

from benchmarks import ideas
from lab import cli, stages
from lab.comparison import spread, stage_plots, wanted_runs
from lab.errors import UserError
from lab.pages import lessons
from lab.storage import runs
from lab.training import run_plots

FIRST = {"adamw": 1e-3, "muon": 4e-3}  # AdamW: the preset's rate, at which the ladder is measured
NAMES = {"adamw": "AdamW", "muon": "Muon"}


@dataclass
class Settings:
    """Measures losses by learning rate.

    On one core, each optimizer takes about 2½ hours (AdamW no time after compare.py --tune).
    """

    stages: str | None = None
    """Stages to train, as in 0-7. None: all."""
    seeds: int = 2
    """Runs of each stage, optimizer and rate."""
    steps: int = 2000
    """Steps of each run."""
    keep: bool = False
    """Keep what results/ideas/rates.json already has from as many seeds and steps, and measure the rest."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    chosen = wanted_runs.chosen_stages(settings.stages)
    kept = {}
    if settings.keep and (lessons.IDEAS / "rates.json").exists():
        kept = lessons.read_idea("rates")
    if kept and (kept["seeds"], kept["steps"]) != (settings.seeds, settings.steps):
        raise UserError("results/ideas/rates.json is of other --seeds or --steps; measure without --keep")
    losses, sources = {}, {}
    for optimizer in NAMES:
        found = dict(kept["losses"][optimizer]) if kept else {}
        found_at = dict(kept["sources"][optimizer]) if kept else {}
        for stage in chosen:
            if stage not in found:
                found[stage] = by_rate(stage, optimizer, settings)
                found_at[stage] = {"commit": runs.commit()}
        losses[optimizer] = {stage: found[stage] for stage in stages.names() if stage in found}
        sources[optimizer] = found_at
    measured = {"losses": losses, "sources": sources, "seeds": settings.seeds, "steps": settings.steps}
    heads = ["stage", "at the preset's rate", "gain", "best, AdamW", "gain", "best, Muon", "gain"]
    ideas.write("rates", measured, heads, table(losses), lambda: draw(losses), describe(losses))


def by_rate(stage: str, optimizer: str, settings: Settings) -> dict[str, dict]:
    """The final validation losses of a stage, by learning rate."""
    found = {}

    def mean_loss(rate: float) -> float:
        flags = ["--stage", stage, "--optimizer", optimizer, "--steps", str(settings.steps)]
        flags += ["--lr", str(rate), "--min-lr", str(rate / 10)]
        finals = []
        for seed in range(settings.seeds):
            name = f"rates-{stage}-{optimizer}-{rate:g}-seed{seed}"
            _, metrics = ideas.trained(name, [*flags, "--seed", str(seed)])
            finals.append(metrics[-1]["val_loss"])
        found[rate] = spread.summary(finals)
        return found[rate]["mean"]

    return {f"{rate:g}": found[rate] for rate in ideas.rates_around_the_best(mean_loss, FIRST[optimizer])}


def best(losses: dict[str, dict]) -> str:
    """The rate with the lowest mean loss."""
    return min(losses, key=lambda rate: losses[rate]["mean"])


def table(losses: dict) -> list[list[str]]:
    """A row for each stage; a gain is how far its loss is below that of the row above."""
    rows, before = [], None
    for stage, adamw in losses["adamw"].items():
        muon = losses["muon"][stage]
        now = [adamw[f"{FIRST['adamw']:g}"]["mean"], adamw[best(adamw)]["mean"], muon[best(muon)]["mean"]]
        gains = [gain(a, b) for a, b in zip(before, now, strict=True)] if before else [""] * 3
        cells = [f"{now[0]:.3f}", f"{now[1]:.3f} at {best(adamw)}", f"{now[2]:.3f} at {best(muon)}"]
        pairs = zip(cells, gains, strict=True)
        rows.append([stages.label(stage), *(text for pair in pairs for text in pair)])
        before = now
    return rows


def gain(before: float, now: float) -> str:
    """How far a loss fell, without the minus sign of a gain that rounds to 0."""
    return f"{round(before - now, 3) + 0.0:+.3f}"


def draw(losses: dict):
    """Loss against rate, a line for each stage, a panel for each optimizer; bars from seed to seed."""
    figure, panels = run_plots.new_figure(11, 4.6, columns=2)
    for panel, (optimizer, of) in zip(panels, losses.items(), strict=True):
        tried = sorted({float(rate) for by_rate in of.values() for rate in by_rate})
        for stage, by_rate in of.items():
            rates = [float(rate) for rate in by_rate]
            means = [one["mean"] for one in by_rate.values()]
            ends = [
                (one["mean"] - min(one["values"]), max(one["values"]) - one["mean"])
                for one in by_rate.values()
            ]
            look = stage_plots.style(stage)
            panel.errorbar(rates, means, yerr=list(zip(*ends, strict=True)), capsize=2, **look)
        panel.set_xscale("log", base=2)
        panel.set_xticks(tried, [f"{rate:g}" for rate in tried])
        panel.set_xlabel("learning rate")
        panel.set_title(NAMES[optimizer])
        panel.grid(alpha=0.3)
    lows, highs = zip(*(panel.get_ylim() for panel in panels), strict=True)
    for panel in panels:
        panel.set_ylim(min(lows), max(highs))
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[0].legend(fontsize=8)
    return figure


def describe(losses: dict) -> str:
    """The picture in words."""
    spans = []
    for optimizer, of in losses.items():
        finals = [one[best(one)]["mean"] for one in of.values()]
        spans.append(f"with {NAMES[optimizer]} between {min(finals):.2f} and {max(finals):.2f}")
    return f"Validation loss against learning rate, a line for each stage; the best are {' and '.join(spans)}"


if __name__ == "__main__":
    cli.run(main)
