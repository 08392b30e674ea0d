"""Writes the summary and the pictures of a gpu.json; python -m benchmarks.gpu_report DIR rewrites them."""

import json
import sys
from pathlib import Path

import numpy as np

from lab import stages
from lab.comparison import markdown
from lab.training.run_plots import new_figure, stage_color

WAY_COLORS = {"explicit": "#888888", "sdpa": "#0072B2", "triton": "#D55E00", "flash_attn": "#009E73"}
WAY_COLORS |= {"grouped_mm": "#0072B2", "loop": "#888888", "every expert for every token": "#E69F00"}
WAY_COLORS |= {"eager": "#56B4E9", "graph": "#0072B2", "absorbed": "#CC79A7", "expanded": "#888888"}


def line(name: str, state: dict, seconds: float) -> str:
    """The line for the terminal at the end of a section."""
    why = f" ({state['why']})" if "why" in state else ""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}  {name}: {state['status']}{why}"


def summary(report: dict) -> str:
    """The figures as Markdown tables, and the list of failures."""
    lines = ["# GPU check", "", *machine(report)]
    if report["smoke"]:
        lines += ["", "A smoke test on the CPU with tiny sizes: the figures are meaningless."]
    tables = {
        "tests": tests_table,
        "eager": training_table,
        "compiled": training_table,
        "float32": float32_table,
        "attention": attention_table,
        "mixture": mixture_table,
        "training": run_table,
        "decoding": decoding_table,
        "serving": serving_table,
        "nanogpt": nanogpt_table,
    }
    for name, state in report["sections"].items():
        if name == "machine":
            continue
        seconds = f", {state['seconds']:.0f} s" if "seconds" in state else ""
        why = f": {state['why']}" if "why" in state else ""
        lines += ["", f"## {state['number']} {name} – {state['status']}{seconds}{why}", ""]
        if state["figures"]:
            lines.append(tables[name](state["figures"]))
        apart = {
            why: [part for part, entry in state["skipped"].items() if entry == why]
            for why in state["skipped"].values()
        }
        lines += [f"skipped, {len(parts)}: {why}" for why, parts in apart.items() if state["figures"]]
    if report["failed"]:
        lines += ["", "## Failed (tracebacks in gpu.json)", ""]
        lines += [f"- {entry['section']} {entry['part']}: {entry['error']}" for entry in report["failed"]]
    return "\n".join(lines) + "\n"


def machine(report: dict) -> list[str]:
    entry = report["machine"]
    if not entry:
        return ["The machine has not been identified yet."]
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items() if version)
    found = f"{entry['device']}, {entry['processor']}; {versions}; commit {entry['commit']}"
    figures = report["sections"]["machine"]["figures"]
    if "matrix product" in figures:
        found += f"; matrix product {figures['matrix product']['flops_per_second'] / 1e12:,.1f} TFLOP/s"
    if "copy" in figures:
        found += f"; copy {figures['copy']['bytes_per_second'] / 1e12:,.2f} TB/s"
    return [found + "."]


def number(value: float | None, form: str = ",.0f", unit: float = 1) -> str | None:
    return None if value is None else format(value / unit, form)


def tests_table(figures: dict) -> str:
    slowest = sorted(figures.items(), key=lambda item: -item[1]["seconds"])[:3]
    said = ", ".join(f"{name.split('::')[-1]} {entry['seconds']:.0f} s" for name, entry in slowest)
    return f"{len(figures)} tests ran; the slowest: {said}\n"


def training_table(figures: dict) -> str:
    head = ["stage", "tokens/s", "ms per step", "MFU", "peak memory, MiB", "loss"]
    compiled = any("speed_up" in entry for entry in figures.values())
    rows = []
    for name, entry in figures.items():
        row = [name, number(entry["tokens_per_second"]), number(entry["median_ms"], ".2f")]
        row += [number(entry.get("mfu"), ".1%"), number(entry["peak_memory"], unit=2**20)]
        row += [number(entry.get("loss"), ".3f")]
        if compiled:
            row += [
                number(entry["speed_up"], ".2f"),
                number(entry["compile_seconds"], ".1f"),
                entry["graph_breaks"],
                number(entry.get("without_graphs", {}).get("tokens_per_second")),
                number(entry.get("without_graphs", {}).get("speed_up"), ".2f"),
            ]
        rows.append(row)
    more = ["speed-up over eager", "s to compile", "graph breaks", "tokens/s without CUDA graphs"]
    more += ["speed-up by graphs"]
    return markdown.table(head + more * compiled, rows)


def float32_table(figures: dict) -> str:
    head = ["stage", "steps", "last loss, CPU", "last loss, device", "largest difference"]
    head += ["largest relative difference of a gradient"]
    rows = [
        [
            name,
            len(entry["cpu"]),
            f"{entry['cpu'][-1]:.5f}",
            f"{entry['device'][-1]:.5f}",
            f"{entry['largest_difference']:.1e}",
            ", ".join(
                f"{name} {one:.0e}" for name, one in list(entry.get("worst_gradients", {}).items())[:1]
            ),
        ]
        for name, entry in figures.items()
    ]
    return markdown.table(head, rows)


def attention_table(figures: dict) -> str:
    head = [
        "context",
        "implementation",
        "forward, ms",
        "backward, ms",
        "TFLOP/s",
        "memory, MiB",
        "relative error",
    ]
    rows = []
    for context, by_way in figures.items():
        for way, entry in ways(by_way).items():
            if "skipped" in entry:
                rows.append([context, way, entry["skipped"], *[None] * 4])
                continue
            row = [
                context,
                way,
                *(number(entry.get(key, {}).get("median_ms"), ".3f") for key in ("forward", "backward")),
            ]
            row += [
                number(entry.get("flops_per_second"), ",.1f", 1e12),
                number(entry["peak_memory"], unit=2**20),
            ]
            rows.append([*row, f"{max(one['relative'] for one in entry['differences'].values()):.1e}"])
    return markdown.table(head, rows)


def ways(figures: dict) -> dict[str, dict]:
    """The figures of each implementation, without those that they share."""
    return {name: entry for name, entry in figures.items() if name in WAY_COLORS}


def mixture_table(figures: dict) -> str:
    head = ["mixture", "implementation", "ms", "tokens/s", "memory, MiB", "relative error"]
    rows = []
    for part, by_way in figures.items():
        for way, entry in ways(by_way).items():
            row = [part, way, number(entry.get("median_ms"), ".3f"), number(entry.get("tokens_per_second"))]
            row += [number(entry["peak_memory"], unit=2**20)]
            rows.append([*row, f"{max(one['relative'] for one in entry['differences'].values()):.1e}"])
    return markdown.table(head, rows)


def decoding_table(figures: dict) -> str:
    head = ["model", "implementation", "tokens/s", "ms per token", "speed-up over eager", "s to compile"]
    rows = []
    for part, by_way in figures.items():
        for way, entry in by_way.items():
            if isinstance(entry, dict) and "tokens_per_second" in entry:
                row = [part, way.replace("_", " "), number(entry["tokens_per_second"])]
                row += [number(entry.get("median_ms"), ".3f"), number(entry.get("speed_up"), ".2f")]
                rows.append([*row, number(entry.get("compile_seconds"), ".1f")])
    return markdown.table(head, rows)


def serving_table(figures: dict) -> str:
    head = ["model", "eager, tokens/s", "CUDA graphs, tokens/s", "speed-up", "texts that differ"]
    rows = []
    for part, of in figures.items():
        rates = [number(of[way]["tokens_per_second"]) for way in ("eager", "graph")]
        rows.append([part, *rates, f"{of['graph']['speed_up']:.2f}", of["texts_that_differ"]])
    return markdown.table(head, rows)


def run_table(figures: dict) -> str:
    head = ["run", "data", "steps", "best val loss", "last val loss", "tokens/s", "training, s", "total, s"]
    rows = []
    for name, entry in figures.items():
        row = [
            name,
            entry["dataset"],
            f"{entry['step']} of {entry['steps']}",
            number(entry["best_val_loss"], ".4f"),
        ]
        row += [number(entry["last_val_loss"], ".4f"), number(entry["tokens_per_second"])]
        rows.append([*row, number(entry["training_seconds"]), number(entry["whole_seconds"])])
    return markdown.table(head, rows)


def nanogpt_table(figures: dict) -> str:
    head = ["training", "nanoGPT, tokens/s", "our stage 0, tokens/s", "ratio"]
    return markdown.table(
        head,
        [
            [name, number(entry["nanogpt"]), number(entry["ours"]), f"{entry['ratio']:.2f}"]
            for name, entry in figures.items()
        ],
    )


# Pictures


def pictures(report: dict, out: Path) -> None:
    """Draws a picture for each section that has figures."""
    figures = {name: state["figures"] for name, state in report["sections"].items()}
    if figures.get("eager"):
        draw_training(figures["eager"], figures.get("compiled", {}), out / "training.png")
    if any("forward" in by for part in figures.get("attention", {}).values() for by in ways(part).values()):
        draw_attention(figures["attention"], out / "attention.png")
    if any("median_ms" in by for part in figures.get("mixture", {}).values() for by in ways(part).values()):
        draw_mixture(figures["mixture"], out / "mixture.png")
    if figures.get("decoding"):
        draw_decoding(figures["decoding"], out / "decoding.png")
    if figures.get("training", {}).get("stage 4", {}).get("curve"):
        draw_run(figures["training"]["stage 4"], out / "loss.png")


def draw_training(eager: dict, compiled: dict, path: Path) -> None:
    figure, panels = new_figure(10, 4.2, columns=2)
    names = stages.course()
    labels, height = [stages.label(name) for name in names], 0.38
    places = np.arange(len(names))
    titles = {
        "tokens_per_second": ("training tokens/s (millions)", 1e6),
        "peak_memory": ("peak memory (MiB)", 2**20),
    }
    for panel, (key, (title, unit)) in zip(panels, titles.items(), strict=True):
        for kind, figures, shift in (("eager", eager, -height / 2), ("compiled", compiled, height / 2)):
            values = [(figures.get(name, {}).get(key) or 0) / unit for name in names]
            color = [stage_color(name) for name in names]
            look = (
                {"color": color}
                if kind == "compiled"
                else {"color": "white", "edgecolor": color, "hatch": "///"}
            )
            panel.barh(places + shift, values, height, label=kind, **look)
        panel.set_yticks(places, labels)
        panel.invert_yaxis()
        panel.set_xlabel(title)
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    panels[0].set_title("hatched: eager; solid: compiled", fontsize=10)
    figure.savefig(path)


def draw_attention(figures: dict, path: Path) -> None:
    figure, panels = new_figure(12, 4.2, columns=3)
    contexts = [int(context) for context in figures]
    measures = {
        "forward (ms)": lambda entry: entry["forward"]["median_ms"],
        "backward (ms)": lambda entry: entry["backward"]["median_ms"],
        "memory, forward and backward (MiB)": lambda entry: (
            entry["peak_memory"] and entry["peak_memory"] / 2**20
        ),
    }
    for panel, (title, measure) in zip(panels, measures.items(), strict=True):
        for way in ("explicit", "sdpa", "triton", "flash_attn"):
            points = {
                int(c): measure(entry[way]) for c, entry in figures.items() if "forward" in entry.get(way, {})
            }
            points = {context: value for context, value in points.items() if value}
            if points:
                panel.plot(points.keys(), points.values(), "o-", color=WAY_COLORS[way], label=way)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(contexts, [f"{context:,}" for context in contexts])
        panel.set_xlabel("context (tokens)")
        panel.set_ylabel(title)
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path)


def draw_mixture(figures: dict, path: Path) -> None:
    figure, panel = new_figure(8, 1.2 + 0.9 * len(figures))
    names = ["grouped_mm", "loop", "every expert for every token"]
    places, height = np.arange(len(figures)), 0.26
    for place, name in enumerate(names):
        values = [entry.get(name, {}).get("tokens_per_second", 0) / 1e6 for entry in figures.values()]
        panel.barh(places + (place - 1) * height, values, height, color=WAY_COLORS[name], label=name)
    panel.set_yticks(places, list(figures))
    panel.invert_yaxis()
    panel.set_xlabel("tokens/s, forward and backward (millions)")
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path)


def draw_decoding(figures: dict, path: Path) -> None:
    rows = {part: {k: v for k, v in entry.items() if k in WAY_COLORS} for part, entry in figures.items()}
    figure, panel = new_figure(8, 1.2 + 0.5 * len(rows))
    named, height = set(), 0.38
    for place, by_way in enumerate(rows.values()):
        for way, entry in by_way.items():
            shift = -height / 2 if way in ("eager", "absorbed") else height / 2
            label = None if way in named else {"graph": "CUDA graph"}.get(way, way)
            named.add(way)
            panel.barh(place + shift, entry["tokens_per_second"], height, color=WAY_COLORS[way], label=label)
    panel.set_yticks(range(len(rows)), list(rows))
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.set_xlabel("decoded tokens/s")
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path)


def draw_run(run: dict, path: Path) -> None:
    figure, panel = new_figure(6, 4)
    _, seconds, losses = zip(*run["curve"], strict=True)
    panel.plot(seconds, losses, "o-", color=stage_color("stage4_gqa"))
    best = min(losses)
    panel.axhline(best, color="black", linestyle=":", linewidth=1)
    panel.annotate(f"{best:.4f}", (seconds[0], best), xytext=(0, 4), textcoords="offset points")
    panel.set_xlabel("seconds of training")
    panel.set_ylabel("validation loss (nats per token)")
    panel.set_title(f"stage 4 on {run['dataset']}, step {run['step']} of {run['steps']}", fontsize=10)
    panel.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    out = Path(sys.argv[1])
    report = json.loads((out / "gpu.json").read_text())
    (out / "summary.md").write_text(summary(report), encoding="utf-8")
    pictures(report, out)


if __name__ == "__main__":
    main()
