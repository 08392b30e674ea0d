"""Compares the stages on the same data, with the same budget and seeds: python compare.py

Trains the runs that are missing (finished runs are reused, interrupted ones resumed), measures speed and
memory, and writes results.json, ladder.md and the pictures to --out. Flags that compare.py does not know are
passed to train.py for every run: python compare.py --seeds 1 --steps 500 --data my.txt. Also: python
compare.py --diff 3 4 shows what changed between two stages; python compare.py --runs A B compares any runs.
"""

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # first, since importing torch takes seconds

import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from lab import cli, formats, interrupt, stages
from lab import device as devices
from lab.comparison import diffs, interleaved, markdown, overview, report, spread, wanted_runs
from lab.errors import UserError, shown
from lab.interrupt import StopRequest
from lab.storage import locks, runs
from lab.training import run_plots

LEFT_OUT = ("what changed", "lines changed", "parameters (active)", "FLOPs per token", "bits per byte")
STOPPED = [128 + number for number in interrupt.SIGNALS]  # exit statuses of a run that a signal stopped
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)  # learning rates that --tune tries
TUNING_SEEDS = 2  # seeds for each of them


@dataclass
class Settings:
    """Compares the stages; flags that are not listed here are passed to train.py."""

    stages: str | None = None
    """Stages to compare, as in 0-7 or 0,3,4. None: all."""
    seeds: int = 3
    """Runs per stage, with seeds 0, 1, …"""
    only_draw: bool = False
    """Train and measure nothing: draw the existing runs and list what is missing."""
    tune: bool = False
    """Also train every stage with five learning rates and two seeds; the ladder adds its best loss."""
    rounds: int = 5
    """How often each speed is measured, the stages in turn (by context 3 times at most); 0: not at all."""
    contexts: str = "64,256,1024"
    """Contexts at which speed and memory are also measured, if the stage supports them; empty: none."""
    out: str | None = None
    """Folder of the figures and pictures. None: runs/compare/<preset>/results; with --stages, the numbers
    are appended, as in results-3-4."""
    diff: tuple[str, str] | None = None
    """Only show the diff of two stages, as in --diff 3 4 (side by side in 120 columns or more)."""
    runs: tuple[str, ...] = ()
    """Only compare these runs, of any kind: --runs runs/A runs/B. Trains and measures nothing."""

    def __post_init__(self):
        if self.seeds < 1 or self.rounds < 0:
            raise ValueError("seeds must be at least 1, and rounds 0 or more")


@devices.memory_errors("try --rounds 0 (measures no speed), shorter --contexts, or smaller sizes")
def main():
    settings, flags = cli.parse_flags(Settings, sys.argv[1:], return_unknown_args=True)
    console = Console()
    if settings.diff:
        diffs.show(*(stages.find(stage) for stage in settings.diff), console)
        return
    if settings.runs:
        if flags:
            raise UserError(f"--runs compares runs as they are: leave out {' '.join(flags)}")
        compare_runs(settings, console)
        return
    spread.scipy_stats()  # raises an error before the runs, not after them, if scipy is missing
    diffs.git_diff("--version")  # likewise git
    if settings.out and Path(settings.out).is_file():
        raise UserError(f"--out {settings.out} is a file; name a folder for the figures and pictures")
    wanted_runs.check_flags(flags, [field.name for field in fields(Settings)])
    chosen = wanted_runs.chosen_stages(settings.stages)
    contexts = interleaved.parse_contexts(settings.contexts)
    notes, failed = [], []
    known, outdated = wanted_runs.at_hand(notes)
    if settings.only_draw:
        if "--preset" not in " ".join(flags):
            preset = wanted_runs.preset_at_hand(chosen, known)
            flags = [*flags, *(["--preset", preset] if preset else [])]
        dataset = wanted_runs.dataset_at_hand(chosen, flags, known)
    else:
        wanted, _ = wanted_runs.wanted_settings(chosen[0], 0, flags)
        dataset = wanted_runs.dataset_name(wanted)
        needed = wanted_runs.plan(chosen, settings.seeds, flags, known, dataset)
        if settings.tune:
            for rate in RATES:
                tuning = [*flags, "--lr", str(rate), "--min-lr", str(rate / 10)]
                needed += wanted_runs.plan(chosen, TUNING_SEEDS, tuning, known, dataset, needed)
        say_how_long(needed, devices.choose(wanted.device), console)
        train(needed, console)
        failed = [run for run in needed if run.failure]
        notes = []
        known, outdated = wanted_runs.at_hand(notes)  # again, with the runs just trained
    notes += wanted_runs.outdated_notes(chosen, outdated)
    wanted, _ = wanted_runs.wanted_settings(chosen[0], 0, flags)
    out = Path(settings.out) if settings.out else default_folder(wanted.preset, chosen)
    found = wanted_runs.collect(chosen, settings.seeds, flags, known, dataset, notes)
    if not found:
        for note in [*notes, *(f"failed: {run.name}: {run.failure}" for run in failed)]:
            print(note, file=sys.stderr)
        raise UserError("there is no finished run to draw; to train the runs, leave out --only-draw")
    out.mkdir(parents=True, exist_ok=True)
    if settings.rounds and not settings.only_draw:
        configs = {name: stage_runs.config for name, stage_runs in found.items()}
        speeds = interleaved.everything(
            configs, devices.choose(wanted.device), settings.rounds, contexts, console
        )
        runs.write_json(out / "speeds.json", speeds)
    else:
        speeds = interleaved.read(out, notes)
        if not speeds and not settings.out:  # perhaps these stages were measured together with the others
            speeds = interleaved.read(default_folder(wanted.preset, wanted_runs.chosen_stages(None)), notes)
        if not speeds:
            notes.append("missing: speeds and memory; to measure them, leave out --only-draw and --rounds 0")
    found = report.at_measured_speeds(found, speeds)
    results = summarize(
        found, speeds, chosen, flags, known, dataset, settings.tune, out, devices.choose(wanted.device)
    )
    (out / "ladder.md").write_text(report.ladder(results) + "\n", encoding="utf-8")
    runs.write_json(out / "curves.json", {"format": formats.RESULTS, "stages": report.curves(found, results)})
    drawn = report.draw(found, results, speeds, out)
    console.print(ladder_table(results))
    for note in notes:
        print(note, file=sys.stderr)
    print(f"{shown(out)}: results.json, curves.json, ladder.md, {', '.join(drawn)}")
    if failed:
        for run in failed:
            print(f"failed: {run.name}: {run.failure}", file=sys.stderr)
        sys.exit(1)


def compare_runs(settings: Settings, console: Console) -> None:
    """Tabulates and plots runs of any kind; the settings in which they differ are columns."""
    found = overview.read(settings.runs)
    rows = overview.table(found)
    table = Table(box=None, padding=(0, 1))
    for head in rows[0]:
        table.add_column(head, overflow="fold", justify="left" if head in ("run", "stage") else "right")
    for number, row in enumerate(rows[1:], start=1):
        print(f"run {number}: {row[0]}")
        table.add_row(str(number), *row[1:])
    console.print(table)
    for folder, config, _ in found:
        runs.warn_of_edits(folder, config)
    loss = "val_loss"
    if len({config["dataset"] for _, config, _ in found}) > 1:
        print("the runs use different data: their losses cannot be compared", file=sys.stderr)
    elif len({runs.read_meta(folder)["tokenizer"] for folder, _, _ in found}) > 1:
        print("the runs have different tokenizers: compare bits per byte, not the loss", file=sys.stderr)
        loss = "bits_per_byte"
    out = Path(settings.out) if settings.out else runs.RUNS / "compare" / "runs"
    out.mkdir(parents=True, exist_ok=True)
    (out / "runs.md").write_text(markdown.table(rows[0], rows[1:]) + "\n", encoding="utf-8")
    histories = {shown(folder): metrics for folder, _, metrics in found}
    run_plots.several_runs(histories, loss, out / "runs.png")
    print(f"{shown(out)}: runs.md, runs.png")


def default_folder(preset: str, chosen: list[str]) -> Path:
    """The folder for the figures of these stages; a selection does not overwrite those of all stages."""
    course = stages.course()
    names = "".join(f"-{stages.number(name) if name in course else name}" for name in chosen)
    return runs.RUNS / "compare" / preset / f"results{'' if chosen == course else names}"


def say_how_long(needed: list[wanted_runs.Run], device: torch.device, console: Console) -> None:
    """Prints how many runs are still to be trained, and about how long this takes."""
    left = [run for run in needed if not run.finished()]
    if left:
        with console.status("timing a step of each stage", spinner="line"):
            seconds = interleaved.seconds_of_runs(left, device)
        print(f"{len(left)} runs to train: about {max(1, round(seconds / 60))} min on this machine")


def train(needed: list[wanted_runs.Run], console: Console) -> None:
    """Trains the unfinished runs one after another, with one live display.

    A run that another process is training is postponed; in the end, train waits for it.
    """
    left = deque(run for run in needed if not run.finished())
    spent = {}  # seconds per step, by stage
    busy = 0  # consecutive runs that other processes are training
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while left:
            run = left.popleft()
            try:
                with run.claimed():
                    if not run.finished():  # another comparison may have finished it
                        train_one(run, needed, live, spent)
                busy = 0
            except locks.Taken as taken:
                left.append(run)
                busy += 1
                if busy == len(left):
                    console.print(f"waiting for {run.name}: process {taken.pid} is training it")
                if busy >= len(left):
                    time.sleep(1)


def train_one(run: wanted_runs.Run, needed: list[wanted_runs.Run], live: Live, spent: dict) -> None:
    """Trains one run in a process of its own, and passes a stop signal on to it, so that it saves."""
    log = run.folder.with_name(run.folder.name + ".log")
    began, first_step = time.perf_counter(), run.step()
    if not live.console.is_terminal:
        print(f"{run.name}: {shown(run.folder)}", flush=True)
    # In its own session, the child does not receive Ctrl-C itself, so it gets each signal exactly once.
    options = {"stderr": subprocess.STDOUT, "start_new_session": True}
    with open(log, "w") as output, StopRequest() as request:
        child = subprocess.Popen(run.command(), stdout=output, **options)
        try:
            while child.poll() is None and not request.signal:
                time.sleep(0.5)
                steps = run.step() - first_step
                if steps > 0:
                    spent[run.settings.stage] = (time.perf_counter() - began) / steps
                live.update(progress_table(needed, run, spent), refresh=True)
            if request.signal:
                child.send_signal(request.signal)
            child.wait()
        except BaseException:  # for instance, a second Ctrl-C
            child.terminate()
            child.wait()
            raise
    if request.signal or child.returncode in STOPPED:
        print("interrupted; to resume, rerun the same command", file=sys.stderr)
        sys.exit(128 + request.signal if request.signal else child.returncode)
    if child.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if child.returncode < 0:
            errors.append(f"ended by {signal.Signals(-child.returncode).name}")
        run.failure = (errors or lines or [f"exit status {child.returncode}"])[-1]
        print(f"failed: {run.name}: {run.failure} (see {shown(log)})", file=sys.stderr)
    else:
        log.unlink()


def progress_table(needed: list[wanted_runs.Run], current: wanted_runs.Run, spent: dict) -> Table:
    """The state of every run, and the remaining time."""
    table = Table(title=None, box=None, padding=(0, 2))
    for head in ("run", "state", "step", "val loss"):
        table.add_column(head)
    average = sum(spent.values()) / len(spent) if spent else None  # seconds per step, for stages not run yet
    to_go = 0.0
    for run in needed:
        last = wanted_runs.last_record(run.folder)
        step, steps = last.get("step", 0), run.settings.steps
        done = run.finished()
        if run.failure:
            state = "failed"
        elif run is current:
            state = "running"
        else:
            state = "done" if done else "waiting"
        if not done and not run.failure and average:
            to_go += (steps - step) * spent.get(run.settings.stage, average)
        losses = [r["val_loss"] for r in wanted_runs.read_metrics(run.folder) if "val_loss" in r]
        style = {"running": "bold", "failed": "red", "waiting": "dim"}.get(state)
        table.add_row(run.name, state, f"{step}/{steps}", f"{losses[-1]:.4f}" if losses else "", style=style)
    minutes = f"about {to_go / 60:.0f} minutes to go" if average else ""
    table.caption = f"{sum(run.finished() for run in needed)} of {len(needed)} runs done; {minutes}"
    return table


def summarize(
    found: dict,
    speeds: dict,
    chosen: list,
    flags: list,
    known: list,
    dataset: str,
    tune: bool,
    out: Path,
    device: torch.device,
):
    """Writes results.json; returns the figures by stage, empty for a stage without runs."""
    rows = {
        name: report.figures(found[name], interleaved.of_stage(speeds, name)) if name in found else {}
        for name in chosen
    }
    if tune:
        for row in rows.values():
            if row:
                row["tuned"] = best_rate(row["stage"], flags, known, dataset)
    report.mark_noise({name: row for name, row in rows.items() if row})
    path = out / "results.json"
    results = runs.read_json(path) if path.exists() else {}
    formats.check(results, formats.RESULTS, shown(path))
    results |= {
        "format": formats.RESULTS,
        "machine": runs.machine(device) | {"commit": runs.commit()},
        "dataset": dataset,
        "preset": next(iter(found.values())).config["settings"]["preset"],
        "stages": {name: row for name, row in rows.items() if row},
        "speeds": {key: value for key, value in speeds.items() if key.endswith("by_context")}
        | {"rounds": speeds.get("rounds"), "machine": speeds.get("machine")},
    }
    runs.write_json(path, results)
    return rows


def best_rate(stage: str, flags: list[str], known: list, dataset: str) -> dict | None:
    """The best of the learning rates tried for a stage, by its mean loss; None if none was tried."""
    tried = {}
    for rate in RATES:
        wanted, _ = wanted_runs.wanted_settings(
            stage, 0, [*flags, "--lr", str(rate), "--min-lr", str(rate / 10)]
        )
        losses = {
            config["settings"]["seed"]: wanted_runs.last_record(folder)["val_loss"]
            for folder, config in wanted_runs.finished_runs(wanted, dataset, known)
            if config["settings"]["seed"] < TUNING_SEEDS
        }
        if losses:
            tried[rate] = spread.summary([losses[seed] for seed in sorted(losses)])
    if not tried:
        return None
    rate = min(tried, key=lambda rate: tried[rate]["mean"])
    return {"lr": rate, "val_loss": tried[rate], "tried": {f"{rate:g}": loss for rate, loss in tried.items()}}


def ladder_table(results: dict[str, dict]) -> Table:
    """The ladder for the terminal, without the columns in LEFT_OUT."""
    head, _, *rows = report.ladder(results).splitlines()
    titles, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in (head, *rows))
    kept = [i for i, title in enumerate(titles) if title not in LEFT_OUT]
    table = Table(box=None, padding=(0, 1))
    for i in kept:
        table.add_column(titles[i], justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(row[i] for i in kept))
    return table


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # `train_one` then ends its child
    cli.run(main)
