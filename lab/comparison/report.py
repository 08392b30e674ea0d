"""The results of a comparison: the figures of every stage, the ladder table, and the pictures."""

import itertools
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from lab import stages
from lab.comparison import diffs, markdown, spread, wanted_runs
from lab.training import cost, run_plots

LOSS_TO_REACH = 2.0
IDEAS = {
    "stage0_gpt": "GPT-2",
    "stage1_rmsnorm": "RMSNorm, no biases",
    "stage2_rope": "rotary positions",
    "stage3_swiglu": "gated MLP",
    "stage4_gqa": "shared key/value heads",
    "stage5_flash": "FlashAttention",
    "stage6_moe": "mixture of experts",
    "stage7a_mla": "latent attention",
    "stage7_mla_mtp": "multi-token prediction",
}


def figures(found: wanted_runs.StageRuns, speeds: dict | None) -> dict:
    """The figures of one stage, for results.json. speeds: as compare.py measures them, or None."""
    config = found.config
    stage = stages.load(config["stage"])
    with torch.device("meta"):
        model = stage.GPT(stage.GPTConfig(**config["model"]))
    origin = diffs.origin(config["stage"])
    finals = [metrics[-1] for metrics in found.history.values()]
    reached = [seconds_to(metrics, LOSS_TO_REACH) for metrics in found.history.values()]
    seconds_to_loss = {"loss": LOSS_TO_REACH, "values": reached}
    if None not in reached:
        seconds_to_loss["mean"] = statistics.mean(reached)
    return {
        "stage": config["stage"],
        "code": config["code"],
        "from": origin,
        "lines_changed": sum(diffs.changed_lines(origin, config["stage"])) if origin else None,
        "parameters": cost.parameters(model),
        "active_parameters": cost.active_parameters(model),
        "flops_per_token": cost.flops_per_token(model),
        "cache_bytes_per_token": cache_bytes(model),
        "seeds": list(found.history),
        "val_loss": spread.summary([record["val_loss"] for record in finals]),
        "bits_per_byte": spread.summary([record["bits_per_byte"] for record in finals]),
        "seconds": spread.summary([record["seconds"] for record in finals]),
        "seconds_to_loss": seconds_to_loss,
        "trained_on": found.machines,
        **(speeds or {}),
    }


def at_measured_speeds(
    found: dict[str, wanted_runs.StageRuns], speeds: dict
) -> dict[str, wanted_runs.StageRuns]:
    """The runs with the seconds that they take at the training speeds measured in turn.

    A run's own clock also counts whatever else the machine did. It is kept where no speed was measured, or
    where the run was compiled (speeds are measured without compiling).
    """
    timed = {}
    for name, stage_runs in found.items():
        measured = speeds.get("training", {}).get(name)
        if measured and not stage_runs.config["settings"]["compile"]:
            speed = statistics.median(measured)
            history = {
                seed: [record | {"seconds": record["tokens"] / speed} for record in metrics]
                for seed, metrics in stage_runs.history.items()
            }
            stage_runs = replace(stage_runs, history=history)
        timed[name] = stage_runs
    return timed


def curves(found: dict[str, wanted_runs.StageRuns], rows: dict[str, dict]) -> dict[str, dict]:
    """The loss curves, for curves.json: means over the seeds; validation also has standard deviations.

    rows: the figures of the stages, by folder name.
    """
    made = {}
    for name, stage_runs in found.items():
        histories = list(stage_runs.history.values())
        ends = [metrics[-1] for metrics in histories]
        evaluated = [[r for r in metrics if "val_loss" in r] for metrics in histories]
        losses = [[r["val_loss"] for r in at] for at in zip(*evaluated, strict=False)]
        std = [rounded(statistics.stdev(at)) if len(at) > 1 else None for at in losses]
        made[name] = {
            "seeds": list(stage_runs.history),
            "flops_per_token": rows[name]["flops_per_token"],
            "tokens_per_second": rounded(ends[0]["tokens"] / statistics.mean(end["seconds"] for end in ends)),
            "tokens": [r["tokens"] for r in evaluated[0]],
            "val_loss": {"mean": [rounded(statistics.mean(at)) for at in losses], "std": std},
            "train": {
                "tokens": [r["tokens"] for r in histories[0]],
                "loss": [
                    rounded(statistics.mean(r["loss"] for r in at)) for at in zip(*histories, strict=False)
                ],
            },
        }
    return made


def rounded(value: float) -> float:
    """Five significant digits, more than a curve can show."""
    return float(f"{value:.5g}")


def cache_bytes(model: torch.nn.Module) -> int:
    """Bytes of the cache in float32 per token that it can hold."""
    return model.new_cache(1, 1).nbytes


def seconds_to(metrics: list[dict], loss: float) -> float | None:
    """Seconds of training until the validation loss first reached this value; None if it never did.

    Between two evaluations the loss is interpolated linearly.
    """
    before = None
    for record in metrics:
        if "val_loss" not in record:
            continue
        if record["val_loss"] <= loss:
            if before is None:
                return record["seconds"]
            part = (before["val_loss"] - loss) / (before["val_loss"] - record["val_loss"])
            return before["seconds"] + part * (record["seconds"] - before["seconds"])
        before = record
    return None


def mark_noise(rows: dict[str, dict]) -> None:
    """Records whether each stage's figures differ significantly from those of the previous stage.

    rows: the figures, by stage. A variant is compared with the stage that it is based on, if that has a row.
    """
    for before, name in itertools.pairwise(rows):
        origin = before if name in stages.COURSE else rows[name]["from"]
        if origin not in rows:
            continue
        one, other = rows[origin], rows[name]
        differs = {
            "from": origin,
            "val_loss": spread.means_differ(*(x["val_loss"]["values"] for x in (one, other))),
        }
        for key in ("training_tokens_per_second", "decoding_tokens_per_second"):
            if key in one and key in other:
                differs[key] = spread.rounds_differ(*(x[key]["values"] for x in (one, other)))
        other["differs"] = differs


def ladder(rows: dict[str, dict]) -> str:
    """The table of the stages in Markdown; ≈: no significant difference from the previous stage."""
    tuned = any("tuned" in row for row in rows.values())
    heads = ["stage", "what changed", "lines changed", "parameters (active)", "FLOPs per token", "val loss"]
    heads += ["val loss at its best rate"] if tuned else []
    heads += ["bits per byte", f"seconds to {LOSS_TO_REACH:.1f}", "training tokens/s", "decoding tokens/s"]
    heads += ["cache bytes per token", "peak memory, MiB"]
    return markdown.table(heads, (cells(name, row, tuned) for name, row in rows.items()))


def cells(name: str, row: dict, tuned: bool) -> list[str | None]:
    """One row of the ladder; name: the stage's folder."""
    idea = "variant"
    if name in IDEAS:
        idea = IDEAS[name]
    elif row:
        idea = f"variant of {stages.label(row['from'])}"
    if not row:
        return [stages.label(name), idea, *[""] * (11 if tuned else 10)]
    millions = f"{row['parameters'] / 1e6:.2f} M"
    if row["active_parameters"] != row["parameters"]:
        millions += f" ({row['active_parameters'] / 1e6:.2f} M)"
    to_loss = row["seconds_to_loss"]
    missed = sum(value is None for value in to_loss["values"])
    reached = f"{to_loss['mean']:,.0f}" if not missed else f"not reached by {missed} of {len(row['seeds'])}"
    made = [
        stages.label(name),
        idea,
        row["lines_changed"],
        millions,
        f"{row['flops_per_token'] / 1e6:.2f} M",
        noise(row, "val_loss") + with_std(row["val_loss"], 3),
    ]
    if tuned:
        best = row.get("tuned")
        made.append(f"{best['val_loss']['mean']:.3f} at {best['lr']:g}" if best else "")
    made += [f"{row['bits_per_byte']['mean']:.3f}", reached]
    for key in ("training_tokens_per_second", "decoding_tokens_per_second"):
        made.append(noise(row, key) + f"{row[key]['median']:,.0f}" if key in row else "")
    made.append(f"{row['cache_bytes_per_token']:,.0f}")
    made.append(f"{row['peak_memory'] / 2**20:,.0f}" if "peak_memory" in row else "")
    return made


def noise(row: dict, key: str) -> str:
    """≈ if the figure does not differ significantly from the previous stage's."""
    return "≈ " if row.get("differs", {}).get(key) is False else ""


def with_std(summary: dict, digits: int) -> str:
    """Mean ± standard deviation; only the mean if there is a single value."""
    mean = f"{summary['mean']:.{digits}f}"
    return mean if summary["std"] is None else f"{mean} ± {summary['std']:.{digits}f}"


def draw(
    found: dict[str, wanted_runs.StageRuns], rows: dict[str, dict], speeds: dict, out: Path
) -> list[str]:
    """Draws all pictures that have figures, as PNGs for light and for dark pages; returns their names."""
    from lab.comparison import stage_plots

    drawn = []
    for dark in (False, True):
        with stage_plots.theme(dark):
            pictures = {"loss": stage_plots.losses(found, rows), "cost": stage_plots.cost(rows)}
            if any("training_tokens_per_second" in row for row in rows.values()):
                pictures["bars"] = stage_plots.bars(rows)
            for what in ("training", "decoding"):
                if speeds.get(f"{what}_by_context"):
                    pictures[f"{what}_context"] = stage_plots.by_context(speeds[f"{what}_by_context"], what)
            for name, figure in pictures.items():
                path = out / f"{name}{'-dark' if dark else ''}.png"
                run_plots.save(figure, path)
                drawn.append(path.name)
    return drawn
