"""Where each idea pays: one script per idea, which writes results/ideas/<idea>.json and its picture.

Each script measures an idea where it matters: at longer contexts, in larger batches or widths, on other text.
Afterwards, `python -m lab.pages.lessons` writes its picture and table into the lesson, after
`<!-- pays <idea> -->`.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from lab import formats, stages
from lab.comparison import stage_plots, wanted_runs
from lab.errors import UserError, shown
from lab.pages import lessons
from lab.storage import edits, locks, runs
from lab.training import log, run_plots, settings

CPU = torch.device("cpu")


def trained(name: str, flags: list[str]) -> tuple[Path, list[dict]]:
    """The folder and the metrics of a run of train.py with these flags; the laptop preset is the default.

    A finished run with the same settings and the current code is reused, such as one of compare.py. Otherwise
    the run is runs/ideas/<name>: it is resumed if it was interrupted, and waited for if it is being trained.
    """
    flags = ["--preset", "laptop", "--device", "cpu", *flags]
    wanted = settings.parse(flags)
    finished = wanted_runs.finished_runs(wanted, wanted_runs.dataset_name(wanted), wanted_runs.at_hand([])[0])
    for folder, config in finished:
        if config["settings"]["seed"] == wanted.seed:
            return folder, log.read_metrics(folder / "metrics.jsonl")
    folder = runs.RUNS / "ideas" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locks.waited_for(folder.with_name(f".{name}.lock")):
        if not (folder / "sample.txt").exists():  # the last file that train.py writes
            command = ["--resume"] if (folder / "last").exists() else flags
            command = [sys.executable, "train.py", *command, "--out", str(folder)]
            print(" ".join(command[1:]), flush=True)
            subprocess.run(command, cwd=stages.ROOT, check=True, stdout=subprocess.DEVNULL)
    difference = edits.difference(runs.read_config(folder))
    if difference:
        raise UserError(f"{shown(folder)} cannot be used: {difference}; delete it and start again")
    return folder, log.read_metrics(folder / "metrics.jsonl")


def rates_around_the_best(loss: Callable[[float], float], rate: float) -> dict[float, float]:
    """The losses by learning rate, in the order of the rates; loss(rate) measures one.

    Starts with this rate and twice as much, and doubles or halves until the best lies between two others.
    """
    losses = {rate: loss(rate), 2 * rate: loss(2 * rate)}
    while True:
        best, lowest, highest = min(losses, key=losses.get), min(losses), max(losses)
        if lowest < best < highest:
            return dict(sorted(losses.items()))
        further = best / 2 if best == lowest else 2 * best
        losses[further] = loss(further)


def write(
    idea: str, measured: dict, heads: list[str], rows: list[list], draw: Callable | None = None, alt: str = ""
) -> None:
    """Writes results/ideas/<idea>.json and, with `draw`, its picture for light and for dark pages.

    measured: all values; heads and rows: the table of the lesson. draw() returns a matplotlib figure, and alt
    says in words what it shows.
    """
    lessons.IDEAS.mkdir(parents=True, exist_ok=True)
    table = {"heads": heads, "rows": rows}
    results = {"format": formats.RESULTS, "machine": runs.machine(CPU), **measured}
    runs.write_json(lessons.IDEAS / f"{idea}.json", results | {"table": table, "picture": alt})
    for dark in (False, True) if draw else ():
        with stage_plots.theme(dark):
            run_plots.save(draw(), lessons.IDEAS / f"{idea}{'-dark' if dark else ''}.png")
