"""The runs of a comparison: which ones it needs, where they are, and how far each one is."""

import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

import data
from lab import stages
from lab.errors import UserError, shown
from lab.storage import checkpoint, edits, locks, runs
from lab.training import log, settings

# Settings of train.py that may differ between equivalent runs: they do not change what is computed, or are
# compared separately (model and seed). A preset is only a set of values.
FREE = {"model", "seed", "preset", "device", "compile", "wandb", "log_every", "out", "resume"}
OURS = ("--stage", "--seed", "--out", "--resume", "--no-resume", "--init-from")


@dataclass
class Run:
    """One stage with one seed: finished, unfinished, or not started yet."""

    settings: settings.Settings
    flags: list[str]
    """Flags of train.py that start it."""
    dataset: str
    """Name of the data set."""
    folder: Path
    failure: str | None = None
    """Why it could not be finished."""

    @property
    def name(self) -> str:
        return f"{self.settings.stage} seed {self.settings.seed}"

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        return last_record(self.folder).get("step", 0)

    def finished(self) -> bool:
        """Whether the metrics reach the last step."""
        return is_finished(self.folder, self.settings.steps)

    def command(self) -> list[str]:
        """The command that starts or resumes the run."""
        train = [sys.executable, str(stages.ROOT / "train.py")]
        if checkpoint.exists(self.folder):
            return [*train, "--resume", "--out", str(self.folder)]
        return [*train, *self.flags, "--out", str(self.folder)]

    def fits(self, config: dict) -> bool:
        """Whether a run with this config.json is this run, trained with the current code."""
        of_this = (config["dataset"], config["settings"]["seed"]) == (self.dataset, self.settings.seed)
        return of_this and same(config, self.settings) and edits.difference(config) is None

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps other comparisons from the run; deletes its folder if it was killed without a checkpoint.

        Another comparison may have started a run with other settings in this folder since the plan was made:
        then this run gets another folder. Raises locks.Taken if another process is training it.
        """
        while True:
            parent, name = self.folder.parent, self.folder.name
            parent.mkdir(parents=True, exist_ok=True)
            with locks.held(parent / f".{name}.lock"):
                if self.folder.exists():
                    with locks.held(runs.lock_file(self.folder)):
                        if not checkpoint.exists(self.folder):
                            shutil.rmtree(self.folder)
                if not self.folder.exists() or self.fits(runs.read_config(self.folder)):
                    yield
                    return
            self.folder = free_folder(parent, self.settings.stage, self.dataset, self.settings.seed, set())


def is_finished(folder: Path, steps: int) -> bool:
    """Whether the metrics of a run reach this step, with a validation loss."""
    last = last_record(folder)
    return last.get("step", 0) >= steps and "val_loss" in last


def last_record(folder: Path) -> dict:
    """The last record of metrics.jsonl; empty if there is none yet."""
    metrics = read_metrics(folder)
    return metrics[-1] if metrics else {}


def read_metrics(folder: Path) -> list[dict]:
    """The records of metrics.jsonl, which is read again only if it has changed; do not change the records.

    Raises UserError if they are not metrics.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    status = path.stat()
    return list(_read_metrics(path, status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=1000)  # compare.py shows the state of every run twice a second
def _read_metrics(path: Path, _modified: int, _size: int) -> list[dict]:
    try:
        metrics = log.read_metrics(path)
        return [record for record in metrics if record["step"] and record["tokens"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown(path)} is damaged: {error!r}") from None


def chosen_stages(text: str | None) -> list[str]:
    """The stages in --stages, such as "0-7", "0, 3, 4" or "3,my_relu"; None: all stages of the course."""
    if text is None:
        return stages.course()
    chosen = []
    for part in filter(None, map(str.strip, text.split(","))):
        ends = re.fullmatch(r"(\d+[a-z]?)\s*-\s*(\d+[a-z]?)", part)
        if ends:
            numbered = [name for name in stages.names() if stages.number(name)]
            first, last = (numbered.index(stages.find(end)) for end in ends.groups())
            chosen += numbered[first : last + 1]
        else:
            chosen.append(stages.find(part))
    if not chosen:
        raise UserError(f"--stages {text!r} names no stage; write it as 0-7 or 0,3,4")
    return sorted(set(chosen), key=stages.names().index)


def check_flags(flags: list[str], ours: list[str]) -> None:
    """Raises UserError for a flag that is neither compare.py's nor a flag of train.py that can be set here.

    ours: the settings of compare.py. (train.py itself checks the values of its flags.)
    """
    train_flags = [field.name for field in fields(settings.Settings)]
    for flag in flags:
        name = flag.split("=")[0].replace("_", "-")
        if name in OURS:
            raise UserError(f"{name} is a flag of train.py only: compare.py sets it for each run")
        plain = name.removeprefix("--").removeprefix("no-").replace("-", "_")
        if name.startswith("--") and "." not in name and plain not in train_flags:
            close = get_close_matches(plain, ours, n=1) or get_close_matches(plain, train_flags, n=1)
            guess = f" Did you mean --{close[0].replace('_', '-')}?" if close else ""
            raise UserError(f"unknown flag {name}.{guess} See python compare.py --help and train.py --help")


def wanted_settings(stage: str, seed: int, flags: list[str]) -> tuple[settings.Settings, list[str]]:
    """The settings of a run, and the flags of train.py that result in them."""
    flags = ["--stage", stage, "--seed", str(seed), *flags]
    return settings.parse(flags), flags


def at_hand(notes: list[str]) -> tuple[list[tuple[Path, dict]], list[tuple[Path, dict]]]:
    """All runs that train.py made, with their configs: those of the current code, and those of other code.

    A line is added to notes for each run that cannot be read.
    """
    usable, outdated = [], []
    for folder in runs.folders():
        try:
            config = runs.read_config(folder)
            read_metrics(folder)
        except UserError as error:
            notes.append(f"left out: {error}")
            continue
        if "imported_from" in config:  # imported weights have no training history
            continue
        if config["stage"] not in stages.names():
            notes.append(f"left out: {shown(folder)} is of {config['stage']!r}, a stage that does not exist")
            continue
        try:
            difference = edits.difference(config)
        except UserError as error:  # its stage's code cannot be parsed at the moment
            notes.append(f"left out: {shown(folder)}: {error}")
            continue
        if difference:
            outdated.append((folder, config))
        else:
            usable.append((folder, config))
    return usable, outdated


def outdated_notes(chosen: list[str], outdated: list[tuple[Path, dict]]) -> list[str]:
    """A line for each reason why runs of the chosen stages are left out."""
    by_reason = {}
    for folder, config in outdated:
        if config["stage"] in chosen:
            reason = (config["stage"], edits.difference(config))
            by_reason.setdefault(reason, []).append(shown(folder))
    notes = []
    for (stage, difference), left_out in by_reason.items():
        listed = ", ".join(left_out[:3]) + (f" and {len(left_out) - 3} more" if len(left_out) > 3 else "")
        notes.append(f"left out of {stage}: {listed}: {difference}")
    return notes


def same(config: dict, wanted: settings.Settings) -> bool:
    """Whether a run was trained with these settings, apart from the seed."""
    try:
        model = type(wanted.model)(**config["model"])
        trained = settings.Settings(**config["settings"], model=model)
    except (KeyError, TypeError, ValueError):  # a run of older or newer code
        return False
    return equal(trained, wanted)


def equal(one: settings.Settings, other: settings.Settings) -> bool:
    """Whether two settings are equivalent, apart from their seeds."""
    compared = [field.name for field in fields(settings.Settings) if field.name not in FREE]
    if type(one.model) is not type(other.model):
        return False
    sizes = replace(other.model, vocab_size=one.model.vocab_size)  # the vocabulary depends on the data
    return one.model == sizes and all(getattr(one, name) == getattr(other, name) for name in compared)


def dataset_name(wanted: settings.Settings) -> str:
    """The name of the data set that runs with these settings are trained on."""
    return data.load(wanted.data, wanted.tokenizer).name


def plan(
    chosen: list[str],
    n_seeds: int,
    flags: list[str],
    known: list,
    dataset: str,
    planned: list[Run] | None = None,
) -> list[Run]:
    """The runs that a comparison needs: one seed of every stage, then the next seed.

    A finished run with the same settings is reused wherever it is. An unfinished run is reused only if a
    comparison started it, since any other may still be in use. A run that is equal to one in `planned` is not
    planned again.
    """
    home = runs.RUNS / "compare"
    if planned is None:
        planned = []
    needed, taken = [], {run.folder for run in planned}
    for seed in range(n_seeds):
        for stage in chosen:
            wanted, all_flags = wanted_settings(stage, seed, flags)
            if any(equal(run.settings, wanted) and run.settings.seed == seed for run in planned):
                continue
            fitting = [
                folder
                for folder, config in known
                if (config["dataset"], config["settings"]["seed"]) == (dataset, seed) and same(config, wanted)
            ]
            finished = [folder for folder in fitting if is_finished(folder, wanted.steps)]
            begun = [folder for folder in fitting if home in folder.parents]
            begun.sort(key=lambda folder: last_record(folder).get("step", 0))
            if finished:
                folder = finished[0]
            elif begun:
                folder = begun[-1]  # the one with the most steps
            else:
                folder = free_folder(home / wanted.preset, stage, dataset, seed, taken)
            taken.add(folder)
            needed.append(Run(wanted, all_flags, dataset, folder))
    return needed


def free_folder(parent: Path, stage: str, dataset: str, seed: int, taken: set[Path]) -> Path:
    """A folder for a new run; -2, -3 … is appended if the plain name belongs to a run of other settings."""
    name = f"{stage}-{dataset}-seed{seed}"
    folder, number = parent / name, 1
    while folder in taken or folder.exists():
        number += 1
        folder = parent / f"{name}-{number}"
    return folder


def preset_at_hand(chosen: list[str], known: list) -> str | None:
    """The most frequent preset among the finished runs of these stages."""
    presets = Counter(
        config["settings"]["preset"]
        for folder, config in known
        if config["stage"] in chosen and is_finished(folder, config["settings"]["steps"])
    )
    return presets.most_common(1)[0][0] if presets else None


def dataset_at_hand(chosen: list[str], flags: list[str], known: list) -> str | None:
    """The most frequent data set among the finished runs with these flags."""
    datasets = Counter()
    for stage in chosen:
        wanted, _ = wanted_settings(stage, 0, flags)
        datasets.update(config["dataset"] for _, config in finished_runs(wanted, None, known))
    return datasets.most_common(1)[0][0] if datasets else None


def finished_runs(wanted: settings.Settings, dataset: str | None, known: list) -> list[tuple[Path, dict]]:
    """The finished runs with these settings and any seed, on this data set (None: any)."""
    return [
        (folder, config)
        for folder, config in known
        if same(config, wanted) and dataset in (None, config["dataset"]) and is_finished(folder, wanted.steps)
    ]


@dataclass
class StageRuns:
    """The finished runs of one stage."""

    config: dict
    """config.json of the first run."""
    folder: Path
    """Folder of the first run."""
    history: dict[int, list[dict]]
    """The records of metrics.jsonl, by seed."""
    machines: list[dict]
    """The machines that trained the runs, each listed once."""


def collect(
    chosen: list[str], n_seeds: int, flags: list[str], known: list, dataset: str | None, notes: list[str]
) -> dict[str, StageRuns]:
    """The finished runs, by stage. A line is added to notes for each stage that lacks some of these seeds."""
    collected = {}
    for stage in chosen:
        wanted, _ = wanted_settings(stage, 0, flags)
        by_seed = {}
        for folder, config in finished_runs(wanted, dataset, known):
            if not math.isfinite(last_record(folder)["val_loss"]):
                notes.append(f"left out: {shown(folder)} diverged: its loss is not a number")
            else:
                by_seed.setdefault(config["settings"]["seed"], (folder, config))
        missing = [seed for seed in range(n_seeds) if seed not in by_seed]
        if missing:
            notes.append(
                f"missing: {stage} seed {', '.join(map(str, missing))}{how_far(stage, flags, known)}"
            )
        if not by_seed:
            continue
        folder, config = by_seed[min(by_seed)]
        machines = []
        for _, other in by_seed.values():
            if other.get("machine") not in machines:
                machines.append(other.get("machine"))
        history = {seed: read_metrics(by_seed[seed][0]) for seed in sorted(by_seed)}
        collected[stage] = StageRuns(config, folder, history, machines)
    return collected


def how_far(stage: str, flags: list[str], known: list) -> str:
    """How far the unfinished runs of a stage are, in words."""
    wanted, _ = wanted_settings(stage, 0, flags)
    begun = [
        f"{shown(folder)} is at step {last_record(folder).get('step', 0)} of {wanted.steps}"
        for folder, config in known
        if same(config, wanted) and not is_finished(folder, wanted.steps)
    ]
    return f" ({'; '.join(begun)})" if begun else ""
