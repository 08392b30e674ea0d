"""The pictures of a comparison; each function returns a figure. A stage has one colour, marker and dash."""

import contextlib

import numpy as np

from lab import stages
from lab.comparison import wanted_runs
from lab.training.run_plots import new_figure, stage_color

MARKERS = "osD^vPX*h"
DASHES = ["-", "--", "-.", ":", "-", "--", "-.", ":", "-"]


@contextlib.contextmanager
def theme(dark: bool):
    """A context in which pictures are drawn for light or for dark pages."""
    import matplotlib

    ink, paper = ("#E6E6E6", "#111418") if dark else ("#1A1A1A", "#FFFFFF")
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    colors = dict.fromkeys(inked, ink)
    colors |= dict.fromkeys(
        ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), paper
    )
    with matplotlib.rc_context(colors | {"grid.color": "#888888"}):
        yield


def style(name: str) -> dict:
    """How a stage's line looks, in every picture."""
    place = stages.names().index(name)
    look = {"color": stage_color(name), "marker": MARKERS[place % len(MARKERS)]}
    look["linestyle"] = DASHES[place] if place < len(DASHES) else (0, (3, 1, 1, 1, 1, 1))  # variants
    return look | {"markersize": 4, "linewidth": 1.6, "label": stages.label(name)}


def losses(found: dict[str, wanted_runs.StageRuns], rows: dict[str, dict]):
    """Validation loss against tokens, seconds and FLOPs: mean over seeds, band of ± 1 standard deviation.

    rows: the figures of the stages, by folder name.
    """
    figure, panels = new_figure(13, 4.6, columns=3)
    scales = {
        "tokens trained on (millions)": lambda record, flops: record["tokens"] / 1e6,
        "seconds of training": lambda record, flops: record["seconds"],
        "training FLOPs (10¹²)": lambda record, flops: record["tokens"] * flops / 1e12,
    }
    for panel, (title, scale) in zip(panels, scales.items(), strict=True):
        for name, runs in found.items():
            evaluated = [[r for r in metrics if "val_loss" in r] for metrics in runs.history.values()]
            n = min(len(metrics) for metrics in evaluated)
            flops = rows[name]["flops_per_token"]
            x = np.mean([[scale(r, flops) for r in metrics[:n]] for metrics in evaluated], axis=0)
            y = np.array([[r["val_loss"] for r in metrics[:n]] for metrics in evaluated])
            panel.plot(x, y.mean(axis=0), **style(name))
            if len(y) > 1:
                spread, mean = y.std(axis=0, ddof=1), y.mean(axis=0)
                panel.fill_between(
                    x, mean - spread, mean + spread, color=style(name)["color"], alpha=0.2, lw=0
                )
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[-1].legend(fontsize=9)
    return figure


def bars(rows: dict[str, dict]):
    """Bars of training and decoding tokens/s, peak memory, and cache bytes per token."""
    figure, panels = new_figure(14.5, 4, columns=4)
    measures = {
        "training tokens/s": lambda row: row.get("training_tokens_per_second", {}).get("median"),
        "decoding tokens/s": lambda row: row.get("decoding_tokens_per_second", {}).get("median"),
        "peak memory of training (MiB)": lambda row: (
            row["peak_memory"] / 2**20 if "peak_memory" in row else None
        ),
        "cache bytes per token": lambda row: row["cache_bytes_per_token"],
    }
    for panel, (title, measure) in zip(panels, measures.items(), strict=True):
        values = {name: measure(row) for name, row in rows.items() if row and measure(row) is not None}
        places = range(len(values))
        drawn = panel.bar(places, values.values(), color=[stage_color(name) for name in values])
        panel.bar_label(drawn, [short(value) for value in values.values()], fontsize=6.5, padding=2)
        panel.set_xticks(places, [short_name(name) for name in values])
        panel.set_xlabel("stage")
        panel.set_title(title, fontsize=10)
        panel.margins(y=0.12)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def short_name(name: str) -> str:
    """The label under a stage's bar: its number, or the first letters of a variant's folder name."""
    return stages.label(name).split()[0][:9]


def short(value: float) -> str:
    """The label over a bar, no wider than the bar."""
    return f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:,.0f}"


def cost(rows: dict[str, dict]):
    """Final validation loss against seconds of training; a bubble's area shows the cache bytes per token."""
    figure, panel = new_figure(8, 5)
    rows = {name: row for name, row in rows.items() if row}
    largest = max(row["cache_bytes_per_token"] for row in rows.values())
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["cache_bytes_per_token"]):
        x, y = row["seconds"]["mean"], row["val_loss"]["mean"]
        area = 1400 * row["cache_bytes_per_token"] / largest
        color = stage_color(name)
        panel.scatter(x, y, s=area, color=color, alpha=0.25, linewidth=0)
        panel.scatter(x, y, s=area, facecolor="none", edgecolor=color, linewidth=1.4)
        marker = style(name)["marker"]
        panel.scatter(x, y, s=30, color=color, marker=marker, label=stages.label(name), zorder=3)
    panel.margins(0.15)
    handles, labels = panel.get_legend_handles_labels()
    handle_of = dict(zip(labels, handles, strict=True))
    in_order = [stages.label(name) for name in rows]
    panel.legend([handle_of[label] for label in in_order], in_order, fontsize=9)
    panel.set_xlabel("seconds of training")
    panel.set_ylabel("final validation loss (nats per token)")
    panel.set_title("lower and further left is better; area: cache bytes per token", fontsize=10)
    panel.grid(alpha=0.3)
    return figure


def by_context(measured: dict[str, dict], what: str):
    """Tokens/s and memory against the context. measured: both of them, by stage and context."""
    from matplotlib.ticker import LogLocator, NullLocator

    if what == "training":
        memory_title, memory_unit = "peak memory (MiB)", 2**20
    else:
        memory_title, memory_unit = "cache (KiB)", 2**10
    figure, panels = new_figure(11, 4.4, columns=2)
    contexts = sorted({int(context) for points in measured.values() for context in points})
    drawn = (("tokens_per_second", f"{what} tokens/s", 1), ("memory", memory_title, memory_unit))
    for panel, (key, title, unit) in zip(panels, drawn, strict=True):
        for name, points in measured.items():
            x = sorted(int(context) for context in points)
            y = [points[str(context)][key] / unit for context in x]
            panel.plot(x, y, **style(name))
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(contexts, [str(context) for context in contexts])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.yaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("context (tokens)")
        panel.set_ylabel(title)
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=9)
    return figure
