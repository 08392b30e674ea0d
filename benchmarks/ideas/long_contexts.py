"""Shows where FlashAttention pays: time and memory of long contexts, and which one still trains in 4 GiB.

python -m benchmarks.ideas.long_contexts measures two layers of the laptop preset's widths with the attention
of stage 4, with that of stage 5 (SDPA from a context of 513 on) and with stage5_flash/tiled.py: a training
step, and a pass without gradients, as for a prompt. Each measurement has a process of its own, because a
process cannot reset its peak memory. Writes results/ideas/long_contexts.json and a picture; afterwards run
python -m lab.pages.lessons.

Everything runs in one thread, and its processor time counts: other programs hardly change it.
"""

import json
import os
import resource
import statistics
import sys
from dataclasses import dataclass

from benchmarks import ideas
from lab import cli
from lab.comparison import isolated
from lab.errors import UserError
from lab.training import run_plots

VARIANTS = {"stage 4": ("4", "auto"), "stage 5": ("5", "auto"), "tiled.py": ("5", "tiled")}
SIZES = isolated.LAPTOP | {"n_layer": 2}
ROOM = 4 * 2**30  # bytes: the memory in which the longest context must train
KINDS = {"training": "a training step", "forward": "a pass without gradients"}


@dataclass
class Settings:
    """Measures three implementations of attention at long contexts."""

    rounds: int = 3
    """Number of interleaved measurements; medians are reported."""
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    """Numbers of tokens of the one text in the batch."""
    largest: float = 6.0
    """GiB that a process may use; what needs more is reported as too large."""
    precision: int = 512
    """The longest context that trains in 4 GiB is searched among the multiples of this number."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    print("about 15 minutes of one core", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(
        resource.RLIMIT_DATA, (int(settings.largest * 2**30), hard)
    )  # the processes inherit it
    measured = {what: by_context(what, settings) for what in KINDS}
    longest = {name: longest_context(name, measured["training"][name], settings) for name in VARIANTS}
    write(measured, longest, settings)


def one(name: str, what: str, context: int) -> dict:
    """The result of isolated.measure; {"error": …} if there is not enough memory.

    Raises UserError for any other error.
    """
    stage, kernel = VARIANTS[name]
    options = {"attention_kernel": kernel, "model": json.dumps(SIZES), "device": "cpu", "clock": "processor"}
    made = isolated.measure(stage=stage, what=what, context=context, steps=1, **options)
    if "not enough memory" not in made.get("error", "not enough memory"):
        raise UserError(f"{name} could not be measured at a context of {context}: {made['error']}")
    return made


def by_context(what: str, settings: Settings) -> dict[str, dict[int, dict]]:
    """By variant and context: the seconds of a step, the process's peak memory, and what the step adds to it.

    {"error": …} stands for what does not fit; longer contexts are then not tried.
    """
    results = {name: {} for name in VARIANTS}
    for context in settings.contexts:
        repeats = {name: [] for name in VARIANTS if "error" not in last(results[name])}
        for _ in range(settings.rounds):
            for name, of in repeats.items():
                if not of or "error" not in of[-1]:
                    of.append(one(name, what, context))
        for name, of in repeats.items():
            results[name][context] = summary(of, context)
    return results


def last(by_context: dict[int, dict]) -> dict:
    """The measurement at the longest context so far."""
    return by_context[max(by_context)] if by_context else {}


def summary(repeats: list[dict], context: int) -> dict:
    """The medians of some measurements. They have no speed to report if one of them failed."""
    errors = [made for made in repeats if "error" in made]
    if errors:
        return errors[0]
    return {
        "seconds": statistics.median(context / made["tokens_per_second"] for made in repeats),
        "peak_memory": statistics.median(made["peak_memory"] for made in repeats),
        "memory": statistics.median(made["peak_memory"] - made["memory_before"] for made in repeats),
    }


def longest_context(name: str, measured: dict[int, dict], settings: Settings) -> dict:
    """The longest context with which a process trains in 4 GiB, all of its memory counted.

    Searched by measuring, if some context was too large. Else extrapolated from the last two, which is only
    right if the memory grows linearly.
    """

    def fits(context: int, made: dict) -> bool:
        tried[context] = made.get("peak_memory")
        return "error" not in made and made["peak_memory"] <= ROOM

    tried = {}
    contexts = sorted(measured)
    too_large = [context for context in contexts if not fits(context, measured[context])]
    if not too_large:
        (before, less), (context, more) = ((c, measured[c]["peak_memory"]) for c in contexts[-2:])
        bytes_per_token = (more - less) / (context - before)
        reached = context + (ROOM - more) / bytes_per_token
        return {"measured": False, "context": int(reached), "bytes_per_token": bytes_per_token}
    least = max((context for context in contexts if context < too_large[0]), default=0)
    low, high = least // settings.precision, -(-too_large[0] // settings.precision)
    while high - low > 1:
        middle = (low + high) // 2
        context = middle * settings.precision
        repeats = [one(name, "training", context) for _ in range(settings.rounds)]
        if fits(context, summary(repeats, context)):
            low = middle
        else:
            high = middle
    return {"measured": True, "context": low * settings.precision, "tried": tried}


def write(measured: dict, longest: dict, settings: Settings) -> None:
    """Writes the results, the table and the picture."""
    rows = []
    for what, title in KINDS.items():
        for name in VARIANTS:
            cells = []
            for context in settings.contexts:
                made = measured[what][name].get(context)
                if made is None or "error" in made:
                    cells.append("too large")
                else:
                    cells.append(f"{made['seconds']:.2f} s, {made['memory'] / 2**20:,.0f} MiB")
            rows.append([f"{title}, {name}", *cells, ""])
    for row, name in zip(rows, VARIANTS, strict=False):
        found = longest[name]
        about = f"about {round(found['context'], -3):,} (extrapolated)"
        row[-1] = f"{found['context']:,}" if found["measured"] else about

    def draw():
        figure, grid = run_plots.new_figure(9, 7, columns=2, rows=2)
        for (what, title), panels in zip(KINDS.items(), grid, strict=True):
            for name, color, marker in zip(VARIANTS, ("#D55E00", "#0072B2", "#999999"), "osD", strict=True):
                points = {c: made for c, made in measured[what][name].items() if "error" not in made}
                style = {"color": color, "marker": marker, "label": name}
                panels[0].plot(points.keys(), [made["seconds"] for made in points.values()], **style)
                memory = [made["memory"] / 2**20 for made in points.values()]
                panels[1].plot(points.keys(), memory, **style)
            panels[0].set_ylabel(f"seconds of {title}")
            panels[1].set_ylabel(f"MiB of {title}")
            for panel in panels:
                panel.set_xscale("log", base=2)
                panel.set_yscale("log")
                panel.set_xticks(settings.contexts, [f"{context:,}" for context in settings.contexts])
                panel.yaxis.set_major_formatter("{x:,g}")
                panel.set_xlabel("context (tokens)")
                panel.grid(alpha=0.3)
        grid[0, 0].legend(fontsize=9)
        return figure

    heads = ["", *(f"{context:,}" for context in settings.contexts), "longest context in 4 GiB"]
    alt = (
        "Seconds and memory against the context, for a training step and for a pass without gradients: "
        "stage 4, stage 5 and tiled.py."
    )
    results = {"rounds": settings.rounds, "largest_gib": settings.largest, "sizes": SIZES}
    ideas.write("long_contexts", results | measured | {"longest": longest}, heads, rows, draw, alt)


if __name__ == "__main__":
    cli.run(main)
