"""What the site's charts draw, and the tables behind them."""

import json
import statistics

from lab import formats, stages
from lab.comparison import report

CURVES = stages.ROOT / "results" / "curves.json"

# The columns of the measured models: key, name, digits, and what a number is divided by.
MEASURED = [
    ("val_loss", "validation loss, nats", 3, 1),
    ("training_tokens_per_second", "training tokens/s", 0, 1),
    ("decoding_tokens_per_second", "decoding tokens/s", 0, 1),
    ("seconds_to_loss", f"seconds to a loss of {report.LOSS_TO_REACH}", 0, 1),
    ("flops_per_token", "FLOPs per token, millions", 2, 1e6),
    ("parameters", "parameters, millions", 2, 1e6),
    ("active_parameters", "active parameters, millions", 2, 1e6),
    ("cache_bytes_per_token", "cache bytes per token", 0, 1),
    ("peak_memory", "peak memory, MiB", 0, 2**20),
    ("lines_changed", "lines changed", 0, 1),
]
# The columns of larger models, which are computed and not measured.
COMPUTED = [
    ("flops_per_token", "FLOPs per token, billions", 2, 1e9),
    ("tokens_per_second", "training tokens/s on an H100, estimated", 0, 1),
    ("parameters", "parameters, billions", 2, 1e9),
    ("active_parameters", "active parameters, billions", 2, 1e9),
    ("cache", "cache of 32,768 tokens, GB", 1, 1e9),
    ("fixed", "weights, gradients and optimizer, GB", 1, 1e9),
    ("sequence", "activations of a sequence, GB", 1, 1e9),
]


def curves() -> dict | None:
    """The losses of all stages while they are trained; None before they are measured."""
    if not CURVES.exists():
        return None
    measured = json.loads(CURVES.read_text())
    formats.check(measured, formats.RESULTS, str(CURVES))
    found = []
    for name, row in measured["stages"].items():
        cost = {key: row[key] for key in ("tokens", "flops_per_token", "tokens_per_second")}
        found.append({"name": name, "label": stages.label(name), **cost, **row["val_loss"]})
    return {"stages": found}


def numbers(row: dict, key: str, divisor: float) -> list[float] | None:
    """A figure of results.json with the ends of its error bar: [value, low, high], or only [value].

    The bar of a mean over seeds is a standard deviation; that of a median over rounds is the range of rounds.
    """
    value = row.get(key)
    if isinstance(value, dict):
        if None in value["values"]:
            return None  # a seed did not reach the loss
        if "median" in value:
            found = [value["median"], min(value["values"]), max(value["values"])]
        else:
            std = statistics.stdev(value["values"])
            found = [value["mean"], value["mean"] - std, value["mean"] + std]
        return [number / divisor for number in found]
    return None if value is None else [value / divisor]


def costs(results: dict) -> list[dict]:
    """For each size of models: its columns, and the figures of each stage in them."""
    rows = {name: results["stages"][name] for name in stages.course()}
    sizes = [table("0.8 M, measured on two cores", MEASURED, rows)]
    for size, models in results["scale"].items():
        flat = {}
        for number, model in models.items():
            on_one = {key: model[key]["1"] for key in ("fixed", "tokens_per_second")}
            flat[stages.find(number)] = model | on_one | {"sequence": model["sequence"]["kept"]}
        sizes.append(table(f"{size}, computed", COMPUTED, flat))
    return sizes


def table(title: str, columns: list[tuple], rows: dict[str, dict]) -> dict:
    """The figures of the stages in these columns, as the chart's script and the templates read them.

    same: the columns in which a stage does not differ significantly from the one before.
    """
    found = []
    for name, row in rows.items():
        values = {key: numbers(row, key, divisor) for key, _, _, divisor in columns}
        same = [key for key in values if report.noise(row, key)]
        found.append({"name": name, "label": stages.label(name), "values": values, "same": same})
    heads = [{"key": key, "name": name, "digits": digits} for key, name, digits, _ in columns]
    return {"title": title, "columns": heads, "rows": found}
