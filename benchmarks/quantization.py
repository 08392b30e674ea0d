"""Measures what quantization costs: python -m benchmarks.quantization --runs runs/A [runs/B …]

Quantizes each run with every method at 4, 3 and 2 bits, and compares it with the run itself, window by window
on the same tokens of the validation split: the change of the loss (see deploy/perplexity.py), and the
divergence of its predictions. With several runs of one stage (seeds), the tables have the means over them.
--smollm2 names the imported SmolLM2 run, which is quantized to 4 bits with the head in 8: also its decoding
speed and peak memory, beside llama.cpp with the same codes. Writes quantization.json, quantization.md and the
pictures quantization.png and outliers.png into results/, and the tables and pictures into the lesson.
"""

import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from benchmarks import peak_memory, pretrained
from deploy import perplexity, quantize
from lab import atomic, cli, device, stages
from lab.comparison import markdown, timing
from lab.errors import UserError, shown
from lab.sampling import packed
from lab.storage import runs
from lab.training import run_plots

CPU = torch.device("cpu")
ALT = {
    "quantization.png": "The divergence by bits and method",
    "outliers.png": "A few input channels are much larger than the others",
}
LESSON = stages.ROOT / "deploy" / "quantization" / "README.md"
VARIANTS = {  # name in the table: flags of deploy.quantize
    "RTN": {"method": "rtn"},
    "GPTQ, columns in order": {"method": "gptq", "act_order": False},
    "GPTQ": {"method": "gptq"},
    "AWQ without clipping": {"method": "awq", "clip": False},
    "AWQ": {"method": "awq"},
}


@dataclass
class Settings:
    """Measures the loss of quantized runs, by method and bits."""

    runs: tuple[str, ...] = ()
    """Runs of the course to quantize at each of --bits; several seeds of a stage are averaged."""
    smollm2: str | None = None
    """Run of SmolLM2, as deploy.pretrained makes it, to quantize at 4 bits."""
    bits: tuple[Literal[2, 3, 4, 8], ...] = (4, 3, 2)
    """Bits for the course's runs."""
    group_size: Literal["32", "64", "128", "none"] = "64"
    """Weights of a row that share a scale."""
    data: str = "tinyshakespeare"
    """Text to calibrate on (its training split) and to measure on (its validation split)."""
    tokens: int = 50_000
    """Tokens to predict, for the course's runs."""
    smollm2_tokens: int = 16_384
    """Tokens to predict for SmolLM2, in windows of 512."""
    calibration_tokens: int = 16_384
    """Tokens to calibrate on."""
    rounds: int = 5
    """How often SmolLM2's decoding is timed, with all programs in turn; 0: not at all."""
    threads: int = 2
    """Threads of each program when decoding is timed."""
    out: str = str(stages.ROOT / "results")
    """Folder for quantization.json, quantization.md, quantization.png and outliers.png."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:], may_be_0=("rounds",))
    if not settings.runs and not settings.smollm2:
        raise UserError("name runs to quantize: --runs runs/A runs/B, or --smollm2 runs/smollm2")
    device.prepare(CPU)
    results = {"group_size": settings.group_size, "machine": runs.machine(CPU), "rows": [], "speeds": []}
    for run in settings.runs:
        results["rows"] += measure(settings, Path(run), settings.bits, settings.tokens)
    if settings.smollm2:
        run = Path(settings.smollm2)
        results["rows"] += measure(settings, run, (4,), settings.smollm2_tokens)
        if settings.rounds:
            results["speeds"] = decoding(settings, run)
    out = Path(settings.out)
    text = tables(results["rows"], results["speeds"])
    atomic.write(out / "quantization.json", (json.dumps(results, indent=2) + "\n").encode())
    atomic.write(out / "quantization.md", text.encode())
    if settings.runs:
        plot([row for row in results["rows"] if not row["imported"]], out / "quantization.png")
    named = settings.smollm2 or settings.runs[-1]
    plot_outliers(Path(named), settings, out / "outliers.png")
    if out == stages.ROOT / "results":
        pictures = [name for name in ("quantization.png", "outliers.png") if (out / name).exists()]
        fill_lesson(text + "".join(f"\n![{ALT[name]}](../../results/{name})\n" for name in pictures))
    print(text)


def measure(settings: Settings, run: Path, bits: tuple[int, ...], n_tokens: int) -> list[dict]:
    """Quantizes a run with every method at each number of bits; the first row is the run itself."""
    config = runs.read_config(run)
    wanted = perplexity.Settings(runs=(str(run),), data=settings.data, tokens=n_tokens)
    tokens, _ = perplexity.same_tokens(wanted, [run])
    context = min(512, config["model"]["block_size"])
    windows = perplexity.whole_windows(tokens, n_tokens, context)

    itself, _ = runs.load(run, "best", CPU, torch.float32)
    base = perplexity.window_losses(itself, windows, CPU)
    common = {"run": shown(run), "stage": config["stage"], "imported": "imported_from" in config}
    common |= {"tokens": len(windows) * context}
    rows = [common | {"method": "not quantized", "bits": None, "loss": statistics.mean(base)}]
    scratch = Path(tempfile.mkdtemp(prefix="quantization-"))
    try:
        for n_bits in bits:
            for name, flags in VARIANTS.items():
                out, started = scratch / f"{n_bits}-{len(rows)}", time.perf_counter()
                quantize_run(settings, run, out, n_bits, flags, common["imported"])
                seconds = time.perf_counter() - started
                model, _ = runs.load(out, "best", CPU, torch.float32)
                losses = perplexity.window_losses(model, windows, CPU)
                kl = divergences(model, itself, windows)
                difference, error = perplexity.paired(losses, base)
                row = {"method": name, "bits": n_bits, "loss": statistics.mean(losses)}
                row |= {"difference": difference, "standard_error": error, "seconds": seconds}
                row |= {"divergence": statistics.mean(kl)}
                row |= {"divergence_error": statistics.stdev(kl) / math.sqrt(len(kl)) if len(kl) > 1 else 0}
                row |= {"bytes": perplexity.on_disk(out, "best")}
                rows.append(common | row)
                print(
                    f"{shown(run)}, {n_bits} bits, {name}: {difference:+.4f} ± {error or 0:.4f}, "
                    f"divergence {row['divergence']:.5f}"
                )
                shutil.rmtree(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return rows


def quantize_run(settings: Settings, run: Path, out: Path, bits: int, flags: dict, head: bool) -> None:
    """Quantizes a run with the flags of one of VARIANTS; with `head`, the head in 8 bits."""
    given = {"bits": bits, "group_size": settings.group_size, "data": settings.data}
    given |= {"calibration_tokens": settings.calibration_tokens, "head": "int8" if head else "keep"}
    quantize.quantize(quantize.Settings(run=str(run), out=str(out), device="cpu", **given, **flags))


@torch.inference_mode()
def divergences(model: torch.nn.Module, itself: torch.nn.Module, windows: list[tuple]) -> list[float]:
    """KL(unquantized ‖ quantized) of the next token's distribution, the mean of each window, in nats."""
    found = []
    for idx, _ in windows:
        expected, log_q = (F.log_softmax(each(idx[None])[0].float(), -1) for each in (itself, model))
        found.append((expected.exp() * (expected - log_q)).sum(-1).mean().item())
    return found


def decoding(settings: Settings, run: Path) -> list[dict]:
    """Decoding speed and peak memory of a run in bfloat16, in 4 bits by GPTQ, and of llama.cpp."""
    scratch = Path(tempfile.mkdtemp(prefix="quantization-"))
    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        small = scratch / "int4"
        quantize_run(settings, run, small, 4, VARIANTS["GPTQ"], head=True)
        folders = {"bfloat16": run, "4 bits": small}
        programs, speeds = {}, {}
        for name, folder in folders.items():
            model, _ = runs.load(folder, "best", CPU, torch.bfloat16)
            packed.pack(model)  # as sample.py
            programs[name] = partial(perplexity.decoding_speed, model, CPU)
        if find_spec("xllamacpp"):
            programs["llama.cpp, the same codes in Q4_1"] = llama_cpp(settings, small, scratch / "int4.gguf")
        else:
            print("left out: llama.cpp, because the package xllamacpp is not installed", file=sys.stderr)
        for _ in range(1 + settings.rounds):  # the first does not count
            for name, program in programs.items():
                speeds.setdefault(name, []).append(program())
        measured = []
        for name in programs:
            of = speeds[name][1:]
            row = {"program": name, "tokens_per_second": statistics.median(of), "speeds": of}
            row["ratio"] = timing.median_ratio(of, speeds["bfloat16"][1:])
            if name in folders:
                memory = peak_memory.measure(folders[name], torch.bfloat16)
                row |= {"peak_memory": memory["peak"], "memory_before": memory["before"]}
            measured.append(row)
        return measured
    finally:
        torch.set_num_threads(threads_before)
        shutil.rmtree(scratch, ignore_errors=True)


def llama_cpp(settings: Settings, run: Path, path: Path):
    """A function that decodes some tokens with llama.cpp: tokens per second. Writes a GGUF file."""
    pretrained.export(run, "gguf", path)
    connection, other_end = pretrained.SPAWN.Pipe()
    serve = (other_end, str(path), 256, settings.threads)
    pretrained.SPAWN.Process(target=pretrained.serve_llama_cpp, args=serve, daemon=True).start()
    prompt = [1] * perplexity.PROMPT
    return lambda: pretrained.llama_cpp_generates(connection, 17, prompt).decoding


def tables(rows: list[dict], speeds: list[dict]) -> str:
    """Tables for each stage (the changes by method and bits), for imported runs, and for decoding."""
    parts = []
    for stage in dict.fromkeys(row["stage"] for row in rows if not row["imported"]):
        mine = [row for row in rows if row["stage"] == stage and not row["imported"]]
        bits = sorted({row["bits"] for row in mine if row["bits"]}, reverse=True)
        floats = [row for row in mine if row["bits"] is None]
        loss = statistics.mean(row["loss"] for row in floats)
        parts.append(
            f"Stage {stages.label(stage)}, loss {loss:.4f} before; {len(floats)} run(s), "
            f"{floats[0]['tokens']:,} tokens each. Change of the loss:"
        )
        for key, error in (("difference", "standard_error"), ("divergence", "divergence_error")):
            if key == "divergence":
                parts.append("Divergence:")
            body = [
                [
                    name,
                    *(
                        change([row for row in mine if (row["method"], row["bits"]) == (name, n)], key, error)
                        for n in bits
                    ),
                ]
                for name in VARIANTS
                if any(row["method"] == name for row in mine)
            ]
            parts.append(markdown.table(["method", *(f"{n} bits" for n in bits)], body))
    for run in dict.fromkeys(row["run"] for row in rows if row["imported"]):
        mine = [row for row in rows if row["run"] == run]
        parts.append(f"{Path(run).name}, {mine[0]['tokens']:,} tokens, the head in 8 bits:")
        body = [
            [
                row["method"] + (f", {row['bits']} bits" if row["bits"] else ""),
                f"{math.exp(row['loss']):.2f}",
                change([row], "difference", "standard_error") if row["bits"] else "",
                change([row], "divergence", "divergence_error") if row["bits"] else "",
                f"{row['bytes'] / 1e6:.0f} MB" if row["bits"] else "",
                f"{row['seconds']:.0f} s" if row["bits"] else "",
            ]
            for row in mine
        ]
        heads = ["method", "perplexity", "change of the loss", "divergence", "on disk", "time to quantize"]
        parts.append(markdown.table(heads, body))
    if speeds:
        parts.append("Decoding, one sequence; peak memory beyond that of torch and our code:")
        body = [
            [
                row["program"],
                f"{row['tokens_per_second']:.1f}",
                f"{row['ratio']:.2f}",
                f"{(row['peak_memory'] - row['memory_before']) / 1e6:.0f} MB" if "peak_memory" in row else "",
                f"{row['peak_memory'] / 1e6:.0f} MB" if "peak_memory" in row else "",
            ]
            for row in speeds
        ]
        heads = ["program", "tokens/s", "× bfloat16", "peak memory", "of the whole process"]
        parts.append(markdown.table(heads, body))
    return "\n\n".join(parts) + "\n"


def change(rows: list[dict], key: str, error: str) -> str:
    """The mean of a figure over one or several runs, with its standard error.

    Of one run: that of its windows. Of several: that of their mean, from how much the runs differ. It
    is larger, because it also has the chance in which way each run's weights are rounded.
    """
    if not rows:
        return ""
    values = [row[key] for row in rows]
    several = len(values) > 1
    of_mean = statistics.stdev(values) / math.sqrt(len(values)) if several else rows[0][error] or 0
    sign = "+" if key == "difference" else ""
    return f"{statistics.mean(values):{sign}.4f} ± {of_mean:.4f}"


@torch.no_grad()
def plot_outliers(run: Path, settings: Settings, path: Path) -> None:
    """Plots mean |x| of the channels that q, k and v read, sorted, in a few layers of a run, as a PNG."""
    model, config = runs.load(run, "best", CPU, torch.float32)
    given = quantize.Settings(run=str(run), out="", data=settings.data, calibration_tokens=2048)
    idx = quantize.calibration_windows(given, run, config, model)[:, :-1]
    layers = model.model.layers[: model.config.n_layer]
    chosen = sorted({0, len(layers) // 2, len(layers) - 1})
    figure, axes = run_plots.new_figure(6, 4)
    for color, number in zip(run_plots.RUN_COLORS, chosen, strict=False):
        norm, seen = layers[number].input_layernorm, []
        handle = norm.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        for window in idx:
            model(window[None])
        handle.remove()
        size = torch.cat(seen).abs().mean((0, 1)).sort(descending=True).values
        axes.plot(range(1, len(size) + 1), size, color=color, label=f"layer {number}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("input channel of q, k and v, largest first")
    axes.set_ylabel("mean |x|")
    axes.set_title(run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    run_plots.save(figure, path)


def fill_lesson(text: str) -> None:
    """Writes the tables into the lesson, between its markers."""
    page = LESSON.read_text(encoding="utf-8")
    before, _, rest = page.partition("<!-- quantization -->\n")
    _, end, after = rest.partition("<!-- end quantization -->")
    atomic.write(LESSON, f"{before}<!-- quantization -->\n{text}{end}{after}".encode())


def plot(rows: list[dict], path: Path) -> None:
    """Plots the divergence by bits, a line for each method and a panel for each stage, as a PNG."""
    names = list(dict.fromkeys(row["stage"] for row in rows))
    figure, panels = run_plots.new_figure(4.2 * len(names) + 0.6, 4, columns=len(names))
    for panel, stage in zip([panels] if len(names) == 1 else panels, names, strict=True):
        for color, method in zip(run_plots.RUN_COLORS, VARIANTS, strict=False):
            mine = [row for row in rows if (row["stage"], row["method"]) == (stage, method)]
            bits = sorted({row["bits"] for row in mine})
            means = [statistics.mean(row["divergence"] for row in mine if row["bits"] == n) for n in bits]
            panel.plot(bits, means, "o-", color=color, label=method)
        panel.set_yscale("log")
        panel.set_xticks(bits)
        panel.set_xlabel("bits of a weight")
        panel.set_title(stages.label(stage))
        panel.grid(alpha=0.3)
    (panels if len(names) == 1 else panels[0]).set_ylabel("divergence (nats per token)")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=3)
    run_plots.save(figure, path)


if __name__ == "__main__":
    cli.run(main)
