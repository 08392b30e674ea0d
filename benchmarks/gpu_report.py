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
            why: [part for part, of in state["skipped"].items() if of == why]
            for why in state["skipped"].values()
        }
        lines += [f"skipped, {len(parts)}: {why}" for why, parts in apart.items() if state["figures"]]
    if report["failed"]:
        lines += ["", "## Failed (tracebacks in gpu.json)", ""]
        lines += [f"- {of['section']} {of['part']}: {of['error']}" for of in report["failed"]]
    return "\n".join(lines) + "\n"


def machine(report: dict) -> list[str]:
    of = report["machine"]
    if not of:
        return ["The machine has not been identified yet."]
    versions = ", ".join(f"{name} {version}" for name, version in of["versions"].items() if version)
    found = f"{of['device']}, {of['processor']}; {versions}; commit {of['commit']}"
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
    said = ", ".join(f"{name.split('::')[-1]} {of['seconds']:.0f} s" for name, of in slowest)
    return f"{len(figures)} tests ran; the slowest: {said}\n"


def training_table(figures: dict) -> str:
    head = ["stage", "tokens/s", "ms per step", "MFU", "peak memory, MiB", "loss"]
    compiled = any("speed_up" in of for of in figures.values())
    rows = []
    for name, of in figures.items():
        row = [name, number(of["tokens_per_second"]), number(of["median_ms"], ".2f")]
        row += [number(of.get("mfu"), ".1%"), number(of["peak_memory"], unit=2**20)]
        row += [number(of.get("loss"), ".3f")]
        if compiled:
            row += [number(of["speed_up"], ".2f"), number(of["compile_seconds"], ".1f"), of["graph_breaks"]]
        rows.append(row)
    return markdown.table(head + ["speed-up over eager", "s to compile", "graph breaks"] * compiled, rows)


def float32_table(figures: dict) -> str:
    head = ["stage", "steps", "last loss, CPU", "last loss, device", "largest difference"]
    rows = [
        [
            name,
            len(of["cpu"]),
            f"{of['cpu'][-1]:.5f}",
            f"{of['device'][-1]:.5f}",
            f"{of['largest_difference']:.1e}",
        ]
        for name, of in figures.items()
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
        for way, of in ways(by_way).items():
            if "skipped" in of:
                rows.append([context, way, of["skipped"], *[None] * 4])
                continue
            row = [
                context,
                way,
                *(number(of.get(key, {}).get("median_ms"), ".3f") for key in ("forward", "backward")),
            ]
            row += [number(of.get("flops_per_second"), ",.1f", 1e12), number(of["peak_memory"], unit=2**20)]
            rows.append([*row, f"{max(one['relative'] for one in of['differences'].values()):.1e}"])
    return markdown.table(head, rows)


def ways(figures: dict) -> dict[str, dict]:
    """The figures of each implementation, without those that they share."""
    return {name: of for name, of in figures.items() if name in WAY_COLORS}


def mixture_table(figures: dict) -> str:
    head = ["mixture", "implementation", "ms", "tokens/s", "memory, MiB", "relative error"]
    rows = []
    for part, by_way in figures.items():
        for way, of in ways(by_way).items():
            row = [part, way, number(of.get("median_ms"), ".3f"), number(of.get("tokens_per_second"))]
            row += [number(of["peak_memory"], unit=2**20)]
            rows.append([*row, f"{max(one['relative'] for one in of['differences'].values()):.1e}"])
    return markdown.table(head, rows)


def decoding_table(figures: dict) -> str:
    head = ["model", "implementation", "tokens/s", "ms per token", "speed-up over eager", "s to compile"]
    rows = []
    for part, by_way in figures.items():
        for way, of in by_way.items():
            if isinstance(of, dict) and "tokens_per_second" in of:
                row = [part, way.replace("_", " "), number(of["tokens_per_second"])]
                row += [number(of.get("median_ms"), ".3f"), number(of.get("speed_up"), ".2f")]
                rows.append([*row, number(of.get("compile_seconds"), ".1f")])
    return markdown.table(head, rows)


def run_table(figures: dict) -> str:
    head = ["run", "data", "steps", "best val loss", "last val loss", "tokens/s", "training, s", "total, s"]
    rows = []
    for name, of in figures.items():
        row = [name, of["dataset"], f"{of['step']} of {of['steps']}", number(of["best_val_loss"], ".4f")]
        row += [number(of["last_val_loss"], ".4f"), number(of["tokens_per_second"])]
        rows.append([*row, number(of["training_seconds"]), number(of["whole_seconds"])])
    return markdown.table(head, rows)


def nanogpt_table(figures: dict) -> str:
    head = ["training", "nanoGPT, tokens/s", "our stage 0, tokens/s", "ratio"]
    return markdown.table(
        head,
        [
            [name, number(of["nanogpt"]), number(of["ours"]), f"{of['ratio']:.2f}"]
            for name, of in figures.items()
        ],
    )


# Pictures


def pictures(report: dict, out: Path) -> None:
    """Draws a picture for each section that has figures."""
    of = {name: state["figures"] for name, state in report["sections"].items()}
    if of.get("eager"):
        draw_training(of["eager"], of.get("compiled", {}), out / "training.png")
    if any("forward" in by for figures in of.get("attention", {}).values() for by in ways(figures).values()):
        draw_attention(of["attention"], out / "attention.png")
    if any("median_ms" in by for figures in of.get("mixture", {}).values() for by in ways(figures).values()):
        draw_mixture(of["mixture"], out / "mixture.png")
    if of.get("decoding"):
        draw_decoding(of["decoding"], out / "decoding.png")
    if of.get("training", {}).get("stage 4", {}).get("curve"):
        draw_run(of["training"]["stage 4"], out / "loss.png")


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
        "forward (ms)": lambda of: of["forward"]["median_ms"],
        "backward (ms)": lambda of: of["backward"]["median_ms"],
        "memory, forward and backward (MiB)": lambda of: of["peak_memory"] and of["peak_memory"] / 2**20,
    }
    for panel, (title, measure) in zip(panels, measures.items(), strict=True):
        for way in ("explicit", "sdpa", "triton", "flash_attn"):
            points = {int(c): measure(of[way]) for c, of in figures.items() if "forward" in of.get(way, {})}
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
        values = [of.get(name, {}).get("tokens_per_second", 0) / 1e6 for of in figures.values()]
        panel.barh(places + (place - 1) * height, values, height, color=WAY_COLORS[name], label=name)
    panel.set_yticks(places, list(figures))
    panel.invert_yaxis()
    panel.set_xlabel("tokens/s, forward and backward (millions)")
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path)


def draw_decoding(figures: dict, path: Path) -> None:
    rows = {part: {k: v for k, v in of.items() if k in WAY_COLORS} for part, of in figures.items()}
    figure, panel = new_figure(8, 1.2 + 0.5 * len(rows))
    named, height = set(), 0.38
    for place, by_way in enumerate(rows.values()):
        for way, of in by_way.items():
            shift = -height / 2 if way in ("eager", "absorbed") else height / 2
            label = None if way in named else {"graph": "CUDA graph"}.get(way, way)
            named.add(way)
            panel.barh(place + shift, of["tokens_per_second"], height, color=WAY_COLORS[way], label=label)
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
