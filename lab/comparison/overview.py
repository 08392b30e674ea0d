"""Compares runs of any kind: how their settings differ, how far they are, and their losses."""

import statistics
import time
from dataclasses import asdict, fields
from pathlib import Path

from lab import stages
from lab.errors import UserError, shown
from lab.storage import checkpoint, edits, runs
from lab.training import log, presets
from lab.training.settings import Settings

# Settings that do not change what is computed, or that have a column of their own.
APART = {"model", "stage", "data", "preset", "out", "resume", "wandb", "log_every"}


def beside_preset(config: dict) -> dict[str, object]:
    """Where a run's settings and sizes differ from its preset, by flag: {"lr": 0.002, "model.n_layer": 6}.

    A size that is derived from others (such as a width from n_embd) counts only if it has another value.
    """
    preset = dict(presets.PRESETS.get(config["settings"].get("preset"), presets.PRESETS["laptop"]))
    sizes = preset.pop("model")
    defaults = {field.name: field.default for field in fields(Settings)} | preset
    changed = {
        name: value
        for name, value in config["settings"].items()
        if name not in APART and name in defaults and value != defaults[name]
    }
    known = stages.load(config["stage"]).GPTConfig
    size_defaults = {field.name: field.default for field in fields(known)} | sizes
    given = {name: value for name, value in config["model"].items() if size_defaults.get(name) is not None}
    derived = asdict(known(**{name: value for name, value in given.items() if name in size_defaults}))
    for name, value in config["model"].items():
        default = size_defaults.get(name) if name in given else derived.get(name)
        if value != default and name != "vocab_size":
            changed[f"model.{name}"] = value
    return changed


def differing(configs: list[dict]) -> dict[str, list]:
    """The settings and sizes in which runs differ: for each flag the runs' values (None: it has none)."""
    flat = []
    for config in configs:
        values = {name: value for name, value in config["settings"].items() if name not in APART}
        values |= {f"model.{name}": value for name, value in config["model"].items()}
        flat.append(
            {"stage": stages.label(config["stage"]), "data": config["dataset"], "dtype": config["dtype"]}
            | values
        )
    names = dict.fromkeys(name for values in flat for name in values)
    columns = {name: [values.get(name) for values in flat] for name in names}
    return {name: column for name, column in columns.items() if any(value != column[0] for value in column)}


def flag_text(name: str, value: object) -> str:
    """A setting as a flag of the command line, without the dashes."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else f"no-{flag}"
    return f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}"


def losses(metrics: list[dict]) -> list[float]:
    """The validation losses of a run so far."""
    return [record["val_loss"] for record in metrics if "val_loss" in record]


def last_change(folder: Path) -> float:
    """When a run's last checkpoint was written, or else its folder changed (seconds since the epoch)."""
    return checkpoint.written_at(folder) if checkpoint.exists(folder) else folder.stat().st_mtime


def row(folder: Path) -> list[str]:
    """A line of runs.py: run, stage, data, differences from the preset, step, best loss, time, code."""
    config = runs.read_config(folder)
    metrics = log.read_metrics(folder / "metrics.jsonl")
    best = min(losses(metrics), default=None)
    if "quantization" in config:
        about = config["quantization"]
        bits = " and ".join(str(grid["bits"]) for grid in about["grids"])
        changed, step = f"{about.get('method', 'quantized')}, {bits} bits", "–"
    elif "imported_from" in config:
        changed, step = f"imported from {Path(config['imported_from']).name}", "–"
    else:
        exists = config["stage"] in stages.names()
        changes = [flag_text(*change) for change in beside_preset(config).items()] if exists else ["…"]
        changed = ", ".join([config["settings"]["preset"], *changes])
        step = f"{metrics[-1]['step'] if metrics else 0} of {config['settings']['steps']}"
        if not checkpoint.exists(folder):
            step += ", no checkpoint"
    return [
        shown(folder),
        stages.label(config["stage"]),
        config["dataset"],
        changed,
        step,
        f"{best:.4f}" if best is not None else "–",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(last_change(folder))),
        code(config),
    ]


def code(config: dict) -> str:
    """Whether the code that a run was trained with has changed, in one word."""
    if config["stage"] not in stages.names():
        return "missing"
    if None in edits.trained_with(config):
        return "unknown"
    return "changed" if edits.difference(config) else "same"


def read(names: list[str]) -> list[tuple[Path, dict, list[dict]]]:
    """The runs in these folders, with their configs and metrics. Raises UserError for one without a loss."""
    found = []
    for folder in map(Path, names):
        config, metrics = runs.read_config(folder), log.read_metrics(folder / "metrics.jsonl")
        if not losses(metrics):
            raise UserError(f"{shown(folder)} has no validation loss yet: leave it out, or train it further")
        found.append((folder, config, metrics))
    return found


def table(found: list[tuple[Path, dict, list[dict]]]) -> list[list[str]]:
    """The runs as rows of text, the headings first: the settings in which they differ, then their results."""
    settings = differing([config for _, config, _ in found])
    heads = ["run", *(name.replace("_", "-") for name in settings), "step", "best val loss", "last val loss"]
    rows = [[*heads, "bits per byte", "seconds", "tokens/s", "code"]]
    for i, (folder, config, metrics) in enumerate(found):
        last = next(record for record in reversed(metrics) if "val_loss" in record)
        values = [column[i] for column in settings.values()]
        speeds = statistics.median([record["tokens_per_second"] for record in metrics[1:] or metrics])
        rows.append(
            [
                shown(folder),
                *map(value_text, values),
                str(last["step"]),
                f"{min(losses(metrics)):.4f}",
                f"{last['val_loss']:.4f}",
                f"{last['bits_per_byte']:.4f}",
                f"{last['seconds']:.0f}",
                f"{speeds:,.0f}",
                code(config),
            ]
        )
    return rows


def value_text(value: object) -> str:
    """A setting as the text of a cell; a dash if the run has none."""
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)
