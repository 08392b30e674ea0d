"""Pictures of runs."""

from pathlib import Path

# One colour a stage, in every picture: Okabe and Ito's, which the colour-blind can tell apart.
STAGE_COLORS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999"]


def new_figure(width: float, height: float):
    """An empty figure (inches) and its axes. For files alone: it needs no window and no display."""
    from matplotlib.figure import Figure  # loading it takes most of a second

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.subplots()


def loss_curves(metrics: list[dict], title: str, path: Path) -> None:
    """Training and validation loss against tokens, as a PNG."""
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
    figure.savefig(path)


def validation_curves(histories: dict[str, dict[int, list[dict]]], path: Path) -> None:
    """Validation loss of several stages against tokens, as a PNG.

    histories: by stage's name, by seed, the lines of metrics.jsonl. The line is the mean over seeds, the
    band reaches from the lowest seed to the highest.
    """
    figure, axes = new_figure(8, 4.8)
    for name, history in histories.items():
        evaluated = [[record for record in metrics if "val_loss" in record] for metrics in history.values()]
        millions = [record["tokens"] / 1e6 for record in evaluated[0]]
        by_time = list(
            zip(*([record["val_loss"] for record in metrics] for metrics in evaluated), strict=True)
        )
        means = [sum(values) / len(values) for values in by_time]
        color = STAGE_COLORS[int(name.removeprefix("stage").split("_")[0])]
        label = f"{name.removeprefix('stage').replace('_', ' ')}  {means[-1]:.3f}"
        axes.plot(millions, means, color=color, linewidth=1.8, marker="o", markersize=3.5, label=label)
        lowest, highest = ([pick(values) for values in by_time] for pick in (min, max))
        axes.fill_between(millions, lowest, highest, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("tokens trained on (millions)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("TinyShakespeare, laptop preset, all of the validation split")
    axes.grid(alpha=0.3)
    axes.legend(title="stage, final loss")
    figure.savefig(path)
