"""Pictures of runs."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files alone: no window, no display needed

from matplotlib import pyplot


def loss_curves(metrics: list[dict], title: str, path: Path) -> None:
    """Training and validation loss against tokens, as a PNG."""
    figure, axes = pyplot.subplots(figsize=(7, 4.3), dpi=150, layout="constrained")
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
    pyplot.close(figure)
