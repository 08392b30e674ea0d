"""Measures what quantization costs: python -m benchmarks.quantization --runs runs/A [runs/B …]

Quantizes each run with every method at 4, 3 and 2 bits, and compares the loss with that of the run itself,
window by window on the same tokens of the validation split (see deploy/perplexity.py). With several runs of
one stage (seeds), the table has the mean of their differences. --smollm2 names the imported SmolLM2 run, for
the second table: 4 bits, groups of 64. Writes quantization.json, quantization.md and the picture
quantization.png (the change of the loss by bits and method) into results/, and the tables into the lesson.
"""

import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from deploy import perplexity, quantize
from lab import atomic, cli, device, stages
from lab.comparison import markdown
from lab.errors import UserError, shown
from lab.storage import runs
from lab.training import run_plots

CPU = torch.device("cpu")
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
    out: str = str(stages.ROOT / "results")
    """Folder for quantization.json, quantization.md and quantization.png."""


def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    if not settings.runs and not settings.smollm2:
        raise UserError("name runs to quantize: --runs runs/A runs/B, or --smollm2 runs/smollm2")
    device.prepare(CPU)
    results = {"group_size": settings.group_size, "machine": runs.machine(CPU), "rows": []}
    for run in settings.runs:
        results["rows"] += measure(settings, Path(run), settings.bits, settings.tokens)
    if settings.smollm2:
        results["rows"] += measure(settings, Path(settings.smollm2), (4,), settings.smollm2_tokens)
    out = Path(settings.out)
    text = tables(results["rows"])
    atomic.write(out / "quantization.json", (json.dumps(results, indent=2) + "\n").encode())
    atomic.write(out / "quantization.md", text.encode())
    if out == stages.ROOT / "results":
        fill_lesson(text)
    if settings.runs:
        plot([row for row in results["rows"] if not row["imported"]], out / "quantization.png")
    print(text)


def measure(settings: Settings, run: Path, bits: tuple[int, ...], n_tokens: int) -> list[dict]:
    """Quantizes a run with every method at each number of bits; the first row is the run itself."""
    config = runs.read_config(run)
    wanted = perplexity.Settings(runs=(str(run),), data=settings.data, tokens=n_tokens)
    tokens, _ = perplexity.same_tokens(wanted, [run])
    context = min(512, config["model"]["block_size"])
    windows = perplexity.whole_windows(tokens, n_tokens, context)

    def losses_of(folder: Path) -> list[float]:
        model, _ = runs.load(folder, "best", CPU, torch.float32)
        return perplexity.window_losses(model, windows, CPU)

    base = losses_of(run)
    common = {"run": shown(run), "stage": config["stage"], "imported": "imported_from" in config}
    common |= {"tokens": len(windows) * context}
    rows = [common | {"method": "not quantized", "bits": None, "loss": statistics.mean(base)}]
    scratch = Path(tempfile.mkdtemp(prefix="quantization-"))
    try:
        for n_bits in bits:
            for name, flags in VARIANTS.items():
                out, started = scratch / f"{n_bits}-{len(rows)}", time.perf_counter()
                quantize.quantize(
                    quantize.Settings(
                        run=str(run),
                        out=str(out),
                        bits=n_bits,
                        group_size=settings.group_size,
                        data=settings.data,
                        calibration_tokens=settings.calibration_tokens,
                        device="cpu",
                        **flags,
                    )
                )
                seconds = time.perf_counter() - started
                losses = losses_of(out)
                difference, error = perplexity.paired(losses, base)
                row = {"method": name, "bits": n_bits, "loss": statistics.mean(losses)}
                row |= {"difference": difference, "standard_error": error, "seconds": seconds}
                row |= {"bytes": perplexity.on_disk(out, "best")}
                rows.append(common | row)
                print(f"{shown(run)}, {n_bits} bits, {name}: {difference:+.4f} ± {error or 0:.4f}")
                shutil.rmtree(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return rows


def tables(rows: list[dict]) -> str:
    """A table for each stage (the change of the loss by method and bits), and one for imported runs."""
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
        body = [
            [
                name,
                *(change([row for row in mine if (row["method"], row["bits"]) == (name, n)]) for n in bits),
            ]
            for name in VARIANTS
        ]
        parts.append(markdown.table(["method", *(f"{n} bits" for n in bits)], body))
    for run in dict.fromkeys(row["run"] for row in rows if row["imported"]):
        mine = [row for row in rows if row["run"] == run]
        parts.append(f"{Path(run).name}, {mine[0]['tokens']:,} tokens:")
        body = [
            [
                row["method"] + (f", {row['bits']} bits" if row["bits"] else ""),
                f"{math.exp(row['loss']):.2f}",
                change([row]) if row["bits"] else "",
                f"{row['bytes'] / 1e6:.0f} MB" if row["bits"] else "",
                f"{row['seconds']:.0f} s" if row["bits"] else "",
            ]
            for row in mine
        ]
        heads = ["method", "perplexity", "change of the loss", "on disk", "time to quantize"]
        parts.append(markdown.table(heads, body))
    return "\n\n".join(parts) + "\n"


def change(rows: list[dict]) -> str:
    """The mean paired change of the loss of one or several runs, with its standard error."""
    if not rows:
        return ""
    mean = statistics.mean(row["difference"] for row in rows)
    # Each run's standard error is that of its windows; their mean has this one.
    error = math.sqrt(sum((row["standard_error"] or 0) ** 2 for row in rows)) / len(rows)
    return f"{mean:+.4f} ± {error:.4f}"


def fill_lesson(text: str) -> None:
    """Writes the tables into the lesson, between its markers."""
    page = LESSON.read_text(encoding="utf-8")
    before, _, rest = page.partition("<!-- quantization -->\n")
    _, end, after = rest.partition("<!-- end quantization -->")
    atomic.write(LESSON, f"{before}<!-- quantization -->\n{text}{end}{after}".encode())


def plot(rows: list[dict], path: Path) -> None:
    """Plots the change of the loss by bits, a line for each method and a panel for each stage, as a PNG."""
    names = list(dict.fromkeys(row["stage"] for row in rows))
    figure, panels = run_plots.new_figure(4.2 * len(names) + 0.6, 4, columns=len(names))
    for panel, stage in zip([panels] if len(names) == 1 else panels, names, strict=True):
        for color, method in zip(run_plots.RUN_COLORS, VARIANTS, strict=False):
            mine = [row for row in rows if (row["stage"], row["method"]) == (stage, method)]
            bits = sorted({row["bits"] for row in mine})
            means = [statistics.mean(row["difference"] for row in mine if row["bits"] == n) for n in bits]
            panel.plot(bits, [max(mean, 1e-5) for mean in means], "o-", color=color, label=method)
        panel.set_yscale("log")
        panel.set_xticks(bits)
        panel.set_xlabel("bits of a weight")
        panel.set_title(stages.label(stage))
        panel.grid(alpha=0.3)
    (panels if len(names) == 1 else panels[0]).set_ylabel("change of the loss (nats per token)")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=3)
    figure.savefig(path)


if __name__ == "__main__":
    cli.run(main)
