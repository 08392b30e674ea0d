"""Stage 1: RMSNorm beside LayerNorm, each as PyTorch runs it and fused by torch.compile, at several widths.

python -m benchmarks.ideas.norms writes results/ideas/norms.json and its picture. It needs a C++ compiler.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks import ideas
from lab import cli, device, stages
from lab.training import run_plots

LOOKS = {  # colour, marker, dash
    "copy": ("#888888", "", ":"),
    "LayerNorm": (run_plots.stage_color("stage0_gpt"), "o", "-"),
    "LayerNorm, compiled": (run_plots.stage_color("stage0_gpt"), "s", "--"),
    "RMSNorm": (run_plots.stage_color("stage1_rmsnorm"), "o", "-"),
    "RMSNorm, compiled": (run_plots.stage_color("stage1_rmsnorm"), "s", "--"),
    "F.rms_norm": (run_plots.stage_color("stage2_rope"), "^", "-"),
}
# How often the passes read or write all numbers at least: x and y; then x, y's gradient and x's gradient.
PASSES = {"forward": 2, "forward and backward": 5}


@dataclass
class Settings:
    """Measures RMSNorm and LayerNorm, eager and compiled."""

    widths: tuple[int, ...] = (128, 512, 1024, 2048, 4096)
    """Widths of the residual stream."""
    tokens: int = 2048
    """Tokens that are normed at once."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Precisions of the input, the weights and the output."""
    rounds: int = 30
    """Number of interleaved measurements of each norm; medians are reported."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    device.require_compiler(ideas.CPU)
    device.prepare(ideas.CPU)
    torch.set_num_threads(1)
    print("This takes about 2 minutes, half of them for compiling.")
    measured = {
        dtype: {str(width): measure(width, getattr(torch, dtype), settings) for width in settings.widths}
        for dtype in settings.dtypes
    }
    ideas.write(
        "norms",
        {"norms": measured, "tokens": settings.tokens, "rounds": settings.rounds},
        ["dtype", "width", "MiB moved at least", *(f"{name}, ms" for name in list(LOOKS)[1:])],
        [row(dtype, width, of) for dtype, by_width in measured.items() for width, of in by_width.items()],
        lambda: picture(measured),
        "Effective GB/s by width: the forward pass alone and with the backward pass, in float32 and in "
        "bfloat16. Lines for LayerNorm and RMSNorm, eager and compiled, for F.rms_norm, and for a copy.",
    )


def measure(width: int, dtype: torch.dtype, settings: Settings) -> dict:
    """By pass: the bytes it moves at least, and each norm's milliseconds and effective GB/s."""
    x = torch.randn(settings.tokens, width, dtype=dtype, requires_grad=True)
    gradient, copied = torch.randn_like(x), torch.empty_like(x)
    torch.compiler.reset()  # else it gives up after compiling a function for 8 sizes
    layer_norm = torch.nn.LayerNorm(width, dtype=dtype)
    rms_norm = stages.load("stage1_rmsnorm").RMSNorm(width, 1e-5).to(dtype)
    norms = {
        "LayerNorm": layer_norm,
        "LayerNorm, compiled": torch.compile(layer_norm, fullgraph=True, dynamic=False),
        "RMSNorm": rms_norm,
        "RMSNorm, compiled": torch.compile(rms_norm, fullgraph=True, dynamic=False),
        "F.rms_norm": torch.nn.RMSNorm(width, eps=1e-5, dtype=dtype),
    }
    forward = {"copy": torch.no_grad()(lambda: copied.copy_(x))}
    forward |= {name: torch.no_grad()(lambda norm=norm: norm(x)) for name, norm in norms.items()}
    both = {
        name: lambda norm=norm: torch.autograd.grad(norm(x), [x, *norm.parameters()], gradient)
        for name, norm in norms.items()
    }
    return {
        name: speeds(calls, PASSES[name] * x.nbytes, settings.rounds)
        for name, calls in zip(PASSES, (forward, both), strict=True)
    }


def speeds(calls: dict[str, Callable], least_bytes: int, rounds: int) -> dict:
    """The median milliseconds of each call, made in turn, and the GB/s if it moves only the least bytes.

    The calls have one thread, and the time is that of the CPU: other programs disturb it least.
    """
    seconds = {name: [] for name in calls}
    for _ in range(3 + rounds):
        for name, call in calls.items():
            started = time.process_time()
            call()
            seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(of[3:]) for name, of in seconds.items()}  # the first are warm-ups
    return {
        "least_bytes": least_bytes,
        "milliseconds": {name: 1000 * median for name, median in medians.items()},
        "effective_gb_per_second": {name: least_bytes / median / 1e9 for name, median in medians.items()},
    }


def row(dtype: str, width: str, of: dict) -> list:
    """A line of the table: the forward pass, then both passes, in each cell."""
    moved = " / ".join(f"{each['least_bytes'] / 2**20:.1f}" for each in of.values())
    times = [
        " / ".join(f"{each['milliseconds'][name]:.3g}" for each in of.values()) for name in list(LOOKS)[1:]
    ]
    return [dtype, width, moved, *times]


def picture(measured: dict):
    """The effective GB/s against the width."""
    figure, grid = run_plots.new_figure(9, 3.4 * len(measured), columns=2, rows=len(measured))
    for panels, (dtype, by_width) in zip(grid.reshape(-1, 2), measured.items(), strict=True):
        widths = [int(width) for width in by_width]
        for panel, name in zip(panels, PASSES, strict=True):
            of_width = [of[name]["effective_gb_per_second"] for of in by_width.values()]
            for norm in of_width[0]:
                color, marker, dash = LOOKS[norm]
                values = [of[norm] for of in of_width]
                panel.plot(widths, values, dash, color=color, marker=marker, markersize=5, label=norm)
            panel.set_xscale("log", base=2)
            panel.set_xticks(widths, widths)
            panel.set_ylim(0)
            panel.set_title(f"{name}, {dtype}", fontsize=10)
            panel.set_xlabel("width")
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("effective GB/s")
    handles = grid.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", fontsize=9, ncols=3)
    return figure


if __name__ == "__main__":
    cli.run(main)
