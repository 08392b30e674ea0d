"""Compares the stages on the same data, with the same budget and seeds: python compare.py

Trains what is missing (finished runs are reused, interrupted ones resumed), measures speed and memory, and
leaves results.json, ladder.md and the pictures in --out. Flags that are not of compare.py go to train.py, for
every run: python compare.py --seeds 1 --steps 500 --data my.txt. And python compare.py --diff 3 4 shows what
changed between two stages.
"""

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # before the seconds that importing torch takes

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from lab import cli, comparison, device, diffs, measuring, report, runs, spread, stages
from lab.errors import UserError, shown

LEFT_OUT = ("what changed", "lines changed", "parameters (active)", "FLOPs a token", "bits per byte")
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # statuses of a run that a signal ended
RATES = (5e-4, 1e-3, 2e-3, 3e-3)  # those that --tune tries


@dataclass
class Settings:
    """Compares the stages; flags that are not among these go to train.py."""

    stages: str | None = None
    """Which: 0-7, or 0,3,4. None: all."""
    seeds: int = 3
    """Runs of each stage, with seeds 0, 1, …"""
    only_draw: bool = False
    """Train and measure nothing: draw the runs at hand, and say what is missing."""
    tune: bool = False
    """Give every stage its best of a few learning rates too (seed 0): the ladder shows both."""
    rounds: int = 5
    """Times that each speed is measured, the stages in turn (against the context at most 3); 0: no speed."""
    contexts: str = "64,256,1024"
    """Lengths at which speed and memory are measured too, where the stage can; empty: none."""
    out: str | None = None
    """Folder of the figures and pictures. None: runs/compare/<preset>/results, for some stages with their
    numbers, as in results-3-4."""
    diff: tuple[str, str] | None = None
    """Show the diff of two stages side by side instead, as in --diff 3 4."""

    def __post_init__(self):
        if self.seeds < 1 or self.rounds < 0:
            raise ValueError("seeds must be at least 1, and rounds 0 or more")


@device.memory_errors("try --rounds 0, which measures no speed, shorter --contexts, or smaller sizes")
def main():
    settings, flags = cli.parse_flags(Settings, sys.argv[1:], return_unknown_args=True)
    console = Console()
    if settings.diff:
        diffs.show(*(stages.find(stage) for stage in settings.diff), console)
        return
    spread.scipy_stats()  # better known before the runs than after them
    diffs.changed_lines(1)
    if settings.out and Path(settings.out).is_file():
        raise UserError(f"--out {settings.out} is a file; name a folder for the figures and pictures")
    comparison.check_flags(flags)
    chosen = comparison.chosen_stages(settings.stages)
    contexts = measuring.parse_contexts(settings.contexts)
    notes, failed = [], []
    known = comparison.at_hand(notes)
    if settings.only_draw:
        if "--preset" not in " ".join(flags):
            preset = comparison.preset_at_hand(chosen, known)
            flags = [*flags, *(["--preset", preset] if preset else [])]
        dataset = comparison.dataset_at_hand(chosen, flags, known)
    else:
        wanted, _ = comparison.wanted_settings(chosen[0], 0, flags)
        dataset = comparison.dataset_name(wanted)
        needed = comparison.plan(chosen, settings.seeds, flags, known, dataset)
        if settings.tune:
            for rate in RATES:
                tuning = [*flags, "--lr", str(rate), "--min-lr", str(rate / 10)]
                needed += comparison.plan(chosen, 1, tuning, known, dataset, needed)
        train(needed, console)
        failed = [run for run in needed if run.failure]
        known = comparison.at_hand(notes := [])
    wanted, _ = comparison.wanted_settings(chosen[0], 0, flags)
    out = Path(settings.out) if settings.out else default_folder(wanted.preset, chosen)
    found = comparison.collect(chosen, settings.seeds, flags, known, dataset, notes)
    if not found:
        for note in [*notes, *(f"failed: {run.name}: {run.failure}" for run in failed)]:
            print(note, file=sys.stderr)
        raise UserError("there is no finished run to draw; without --only-draw compare.py trains them")
    out.mkdir(parents=True, exist_ok=True)
    speeds = measuring.read(out)
    if not speeds and not settings.out:  # some stages may have been measured with all the others
        speeds = measuring.read(default_folder(wanted.preset, comparison.chosen_stages(None)))
    if settings.rounds and not settings.only_draw:
        configs = {name: stage_runs.config for name, stage_runs in found.items()}
        speeds = measuring.everything(
            configs, device.choose(wanted.device), settings.rounds, contexts, console
        )
        runs.write_json(out / "speeds.json", speeds)
    elif not speeds:
        notes.append(
            "missing: speeds and memory; compare.py measures them without --only-draw and --rounds 0"
        )
    results = summarize(
        found, speeds, chosen, flags, known, dataset, settings.tune, out, device.choose(wanted.device)
    )
    (out / "ladder.md").write_text(report.ladder(results) + "\n", encoding="utf-8")
    drawn = report.draw(found, results, speeds, out)
    console.print(ladder_table(results))
    for note in notes:
        print(note, file=sys.stderr)
    print(
        f"{shown(out)}: results.json, ladder.md, {', '.join(name for name in drawn if name.endswith('.png'))}"
    )
    if failed:
        for run in failed:
            print(f"failed: {run.name}: {run.failure}", file=sys.stderr)
        sys.exit(1)


def default_folder(preset: str, chosen: list[str]) -> Path:
    """Where the figures of these stages go: some alone do not replace those of all of them."""
    all_stages = chosen == list(stages.names().values())
    numbers = "".join(f"-{stages.number(name)}" for name in chosen)
    return runs.RUNS / "compare" / preset / f"results{'' if all_stages else numbers}"


def train(needed: list[comparison.Run], console: Console) -> None:
    """Trains what is not finished yet, one run after the other, under one live display."""
    left = [run for run in needed if not run.finished()]
    if not left:
        return
    spent = {}  # by stage, seconds of a step
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for run in left:
            run.clear()
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            log = run.folder.with_name(run.folder.name + ".log")
            began, first_step = time.perf_counter(), run.step()
            if not console.is_terminal:
                print(f"{run.name}: {shown(run.folder)}", flush=True)
            interrupted = False
            with open(log, "w") as output:
                child = subprocess.Popen(run.command(), stdout=output, stderr=subprocess.STDOUT)
                try:
                    while child.poll() is None:
                        time.sleep(0.5)
                        steps = run.step() - first_step
                        if steps > 0:
                            spent[run.settings.stage] = (time.perf_counter() - began) / steps
                        live.update(progress_table(needed, run, spent), refresh=True)
                except KeyboardInterrupt:
                    interrupted = True
                    child.wait()  # it got the signal too, and saves
                except BaseException:
                    child.terminate()  # it saves, and does not go on alone
                    child.wait()
                    raise
            # By its status: where the signal arrives inside a callback, Python drops our KeyboardInterrupt.
            if interrupted or child.returncode in STOPPED:
                print("interrupted; the same command goes on where this stopped", file=sys.stderr)
                raise KeyboardInterrupt
            if child.returncode:
                lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
                if child.returncode < 0:
                    errors.append(f"ended by {signal.Signals(-child.returncode).name}")
                run.failure = (errors or lines or [f"exit status {child.returncode}"])[-1]
                print(f"failed: {run.name}: {run.failure} (see {shown(log)})", file=sys.stderr)
            else:
                log.unlink()


def progress_table(needed: list[comparison.Run], current: comparison.Run, spent: dict) -> Table:
    """Which runs are done, running and left, and the time to go."""
    table = Table(title=None, box=None, padding=(0, 2))
    for head in ("run", "state", "step", "val loss"):
        table.add_column(head)
    known = sum(spent.values()) / len(spent) if spent else None  # seconds of a step, for stages not seen yet
    to_go = 0.0
    for run in needed:
        last = comparison.last_record(run.folder)
        step, steps = last.get("step", 0), run.settings.steps
        done = run.finished()
        state = "failed" if run.failure else "running" if run is current else "done" if done else "left"
        if not done and not run.failure and known:
            to_go += (steps - step) * spent.get(run.settings.stage, known)
        losses = [r["val_loss"] for r in comparison.read_metrics(run.folder) if "val_loss" in r]
        style = {"running": "bold", "failed": "red", "left": "dim"}.get(state)
        table.add_row(run.name, state, f"{step}/{steps}", f"{losses[-1]:.4f}" if losses else "", style=style)
    minutes = f"about {to_go / 60:.0f} minutes to go" if known else ""
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
    where: torch.device,
):
    """Writes results.json; returns the figures by the stage's number, empty for one without a run."""
    by_number = {
        number: report.figures(found[name], measuring.of_stage(speeds, name)) if name in found else {}
        for number, name in stages.names().items()
        if name in chosen
    }
    if tune:
        for row in by_number.values():
            if row:
                row["tuned"] = best_rate(row["stage"], flags, known, dataset)
    report.mark_noise({number: row for number, row in by_number.items() if row})
    path = out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results |= {
        "machine": runs.machine(where) | {"commit": runs.commit()},
        "dataset": dataset,
        "preset": next(iter(found.values())).config["settings"]["preset"],
        "stages": {str(number): row for number, row in by_number.items() if row},
        "speeds": {key: value for key, value in speeds.items() if key.endswith("by_context")}
        | {"rounds": speeds.get("rounds"), "machine": speeds.get("machine")},
    }
    runs.write_json(path, results)
    return by_number


def best_rate(stage: str, flags: list[str], known: list, dataset: str) -> dict | None:
    """The best of the learning rates tried on a stage, and its loss."""
    tried = {}
    for rate in RATES:
        wanted, _ = comparison.wanted_settings(
            stage, 0, [*flags, "--lr", str(rate), "--min-lr", str(rate / 10)]
        )
        for folder, config in comparison.finished_runs(wanted, dataset, known):
            if config["settings"]["seed"] == 0:
                tried[rate] = comparison.last_record(folder)["val_loss"]
    if not tried:
        return None
    rate = min(tried, key=tried.get)
    return {"lr": rate, "val_loss": tried[rate], "tried": {f"{rate:g}": loss for rate, loss in tried.items()}}


def ladder_table(results: dict[int, dict]) -> Table:
    """The ladder for the terminal, without the columns that say what a stage is."""
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
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that `train` ends its child
    cli.run(main)
