"""Pictures of runs."""

import io
import math
from pathlib import Path

import numpy as np

from lab import stages

# One colour per stage, the same in every picture, visible on white and on black. Most are from Okabe and
# Ito's palette, which colour-blind readers can tell apart.
STAGE_COLORS = [
    "#888888",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#D55E00",
    "#0072B2",
    "#CC79A7",
    "#8C510A",
    "#7B61C9",
]
RUN_COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888"]
VARIANT_COLORS = ["#C0392B", "#17A2A2", "#8C6D1F", "#2ECC71"]

# Colours of experts, repeated as needed: what matters is how wide each band is, not which expert it shows.
EXPERT_COLORS = ["#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#D55E00", "#CC79A7", "#999999"]


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1):
    """An empty figure (sizes in inches) and its axes. It is only saved to files, so it needs no display."""
    from matplotlib.figure import Figure  # this import takes most of a second

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.subplots(rows, columns)


def save(figure, path: Path) -> None:
    """Saves a figure as a PNG of 256 colours, a third of the size of one with all colours."""
    from PIL import Image  # comes with matplotlib

    whole = io.BytesIO()
    figure.savefig(whole, format="png")
    picture = Image.open(whole).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)


def loss_curves(metrics: list[dict], title: str, path: Path) -> None:
    """Plots training and validation loss against tokens, as a PNG."""
    figure, axes = new_figure(7, 4.3)
    millions = [record["tokens"] / 1e6 for record in metrics]
    axes.plot(
        millions, [record["loss"] for record in metrics], color="#9ecae1", linewidth=1, label="training batch"
    )
    evaluated = [record for record in metrics if "val_loss" in record]
    axes.plot(
        [record["tokens"] / 1e6 for record in evaluated],
        [record["val_loss"] for record in evaluated],
        color="#08519c",
        linewidth=2,
        marker="o",
        markersize=4,
        label="validation",
    )
    if evaluated:
        last = evaluated[-1]
        axes.annotate(
            f"{last['val_loss']:.3f}",
            (last["tokens"] / 1e6, last["val_loss"]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
            color="#08519c",
        )
    axes.set_xlabel("tokens trained on (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def several_runs(histories: dict[str, list[dict]], loss: str, path: Path) -> None:
    """Plots the validation loss of runs against tokens and against seconds of training, as a PNG.

    histories: the records of metrics.jsonl, by the run's name; loss: "val_loss", or "bits_per_byte", which
    can be compared across tokenizers.
    """
    figure, panels = new_figure(11, 4.8, columns=2)
    scales = [("tokens", 1e6, "tokens trained on (millions)"), ("seconds", 1, "seconds of training")]
    for panel, (key, unit, title) in zip(panels, scales, strict=True):
        for i, (name, metrics) in enumerate(histories.items()):
            evaluated = [record for record in metrics if "val_loss" in record]
            panel.plot(
                [record[key] / unit for record in evaluated],
                [record[loss] for record in evaluated],
                color=RUN_COLORS[i % len(RUN_COLORS)],
                linestyle=["-", "--", ":"][i // len(RUN_COLORS) % 3],
                marker="o",
                markersize=3,
                label=name,
            )
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
    units = {"val_loss": "validation loss (nats per token)", "bits_per_byte": "validation bits per byte"}
    panels[0].set_ylabel(units[loss])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=2)
    save(figure, path)


def expert_load(metrics: list[dict], path: Path) -> None:
    """Plots each expert's share of the tokens over the steps, one panel per layer, as a PNG."""
    loads = [record["expert_tokens"] for record in metrics]  # (times, layers, experts)
    steps = [record["step"] for record in metrics]
    n_layers = len(loads[0])
    columns = min(n_layers, 4)
    rows = math.ceil(n_layers / columns)
    figure, axes = new_figure(2.6 * columns + 0.8, 2.4 * rows + 0.6, columns, rows)
    for layer, panel in enumerate(np.atleast_1d(axes).flat):
        if layer >= n_layers:
            panel.set_axis_off()
            continue
        shares = np.array([load[layer] for load in loads])
        shares = 100 * shares / shares.sum(axis=1, keepdims=True)  # (times, experts)
        panel.stackplot(steps, shares.T, colors=EXPERT_COLORS, linewidth=0.3, edgecolor="white")
        panel.set_title(f"layer {layer}", fontsize=9)
        panel.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
        panel.set_ylim(0, 100)
        panel.tick_params(labelsize=8)
        if layer % columns:
            panel.set_yticklabels([])
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("tokens of each expert (%)", fontsize=9)
    save(figure, path)


def balancing(histories: dict[str, list[dict]], path: Path) -> None:
    """Plots the token share of each layer's busiest expert, one panel per balancing method, as a PNG.

    histories: the records of metrics.jsonl, by balancing method.
    """
    figure, axes = new_figure(3.1 * len(histories) + 0.6, 3.2, len(histories))
    for panel, (name, metrics) in zip(np.atleast_1d(axes), histories.items(), strict=True):
        tokens = np.array([record["expert_tokens"] for record in metrics])  # (times, layers, experts)
        shares = 100 * tokens.max(axis=2) / tokens.sum(axis=2)
        steps = [record["step"] for record in metrics]
        for layer, color in zip(range(shares.shape[1]), EXPERT_COLORS, strict=False):
            smooth = np.convolve(shares[:, layer], np.ones(5) / 5, mode="valid")
            panel.plot(steps[4:], smooth, color=color, linewidth=1.2, label=f"layer {layer}")
        equal = 100 / tokens.shape[2]
        panel.axhline(equal, color="black", linestyle=":", linewidth=1)
        panel.set_title(name, fontsize=10)
        panel.set_ylim(0, 75)
        panel.grid(alpha=0.3)
    np.atleast_1d(axes)[0].legend(fontsize=8)
    figure.supxlabel("step (dotted: all experts equally busy)", fontsize=9)
    figure.supylabel("tokens of the busiest expert (%)", fontsize=9)
    save(figure, path)


def stage_color(name: str) -> str:
    """The colour of a stage. Relatives and variants have colours of their own, repeated as needed."""
    i, n_stages = stages.names().index(name), len(stages.course())
    return STAGE_COLORS[i] if i < n_stages else VARIANT_COLORS[(i - n_stages) % len(VARIANT_COLORS)]
