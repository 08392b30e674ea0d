"""Shared by the sections of gpu_check.py: sizes, recording results, and measuring time and memory."""

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lab import device
from lab.comparison import timing
from lab.training import presets

BROKEN = 75  # exit status of a process whose device no longer responds
DECODING_STAGES = ("stage0_gpt", "stage4_gqa", "stage6_moe", "stage7_mla_mtp")
STEPS_COMPARED = 5  # number of first steps whose losses must equal the CPU's
LARGEST_DIFFERENCE = {"float32": 5e-3, "bfloat16": 2e-2}  # tolerances: nats for losses, relative for tensors


@dataclass
class Sizes:
    """The sizes of everything that is measured."""

    preset: dict
    steps: int  # training steps per measurement
    float32_batch: int
    attention: dict  # batch_tokens, contexts, n_head, n_kv_head, head_dim, repeats
    mixture: dict  # tokens, widths, experts as (number, per token), repeats
    batch_sizes: tuple[int, ...]  # for decoding
    tokens: int  # to decode per measurement
    mla: dict  # context, batch_sizes
    product: int  # rows of the square matrices to multiply
    copied: int  # bytes to copy


BABY = presets.PRESETS["baby"]
FULL = Sizes(
    preset=BABY,
    steps=100,
    float32_batch=8,
    attention={
        "batch_tokens": 16384,
        "contexts": (1024, 2048, 4096, 8192, 16384),
        "n_head": 16,
        "n_kv_head": 8,
        "head_dim": 64,
        "repeats": 10,
    },
    mixture={"tokens": 16384, "widths": (384, 1024), "experts": ((8, 2), (64, 6)), "repeats": 20},
    batch_sizes=(1, 64),
    tokens=100,
    mla={"context": 8192, "batch_sizes": (1, 16)},
    product=8192,
    copied=2**32,
)
SMOKE = Sizes(
    preset=BABY
    | {
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "dropout": 0.2},
        "batch_size": 4,
    },
    steps=2,
    float32_batch=2,
    attention={
        "batch_tokens": 32,
        "contexts": (16, 32),
        "n_head": 2,
        "n_kv_head": 1,
        "head_dim": 16,
        "repeats": 2,
    },
    mixture={"tokens": 32, "widths": (32,), "experts": ((4, 2),), "repeats": 2},
    batch_sizes=(1, 3),
    tokens=3,
    mla={"context": 20, "batch_sizes": (1, 2)},
    product=64,
    copied=2**20,
)


class Run:
    """The options of a section, and the file to which it reports."""

    def __init__(self, options: argparse.Namespace):
        self.smoke = options.smoke
        self.sizes = SMOKE if options.smoke else FULL
        self.where = torch.device("cpu" if options.smoke else "cuda")
        self.dtype = device.choose_dtype("auto", self.where)
        self.until = time.monotonic() + options.seconds
        self.nanogpt = options.nanogpt
        self.scratch = Path(options.scratch)
        self.shard = options.shard
        self.done = set(json.loads(options.done))
        self.figures = Path(options.figures)

    def left(self) -> float:
        """Seconds left until the section is killed."""
        return self.until - time.monotonic()

    def note(self, kind: str, part: str, **more) -> None:
        with open(self.figures, "a") as file:
            file.write(json.dumps({"kind": kind, "part": part} | more) + "\n")

    def record(self, part: str, **figures) -> None:
        """Records figures of a part; they are merged with earlier ones."""
        self.note("figures", part, figures=figures)

    def skip(self, part: str, why: str) -> None:
        self.note("skipped", part, why=why)

    @contextlib.contextmanager
    def attempt(self, part: str) -> Iterator[None]:
        """Records an exception as a failure of the part and continues. Exits if the device is lost."""
        self.note("started", part)
        try:
            yield
        except Exception as error:
            self.note("failed", part, error=first_line(error), traceback=traceback.format_exc())
            if is_broken(self.where):
                os._exit(BROKEN)
        self.note("ended", part)
        gc.collect()
        if self.where.type == "cuda":
            torch.cuda.empty_cache()

    def parts(self, names) -> Iterator[str]:
        """The names of the parts that this process still has to run."""
        return (name for name in names if name not in self.done)

    def broke(self, way: str) -> bool:
        """Whether this implementation has crashed an earlier process of the section."""
        return any(part.endswith(f" {way}") for part in self.done)


def first_line(error: BaseException) -> str:
    """The type of an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def is_broken(where: torch.device) -> bool:
    """Whether the device no longer responds in this process, as after an illegal memory access."""
    try:
        device.synchronize(where)
    except RuntimeError:
        return True
    return False


# How time and memory are measured


def seconds_of(
    call: Callable, times: int, where: torch.device, limit: float = float("inf"), queued: bool = False
) -> list[float]:
    """Seconds of each of up to `times` calls, by the device's clock. Stops once `limit` seconds have passed.

    queued: first keep the device busy for a millisecond, while Python launches the kernels to be timed, so
    that only the device's own time counts.
    """
    if where.type != "cuda":
        return timing.seconds_of(call, times, where, limit=limit)
    started = time.monotonic()
    if queued:
        torch.cuda._sleep(2_000_000)  # cycles
    marks = [torch.cuda.Event(enable_timing=True)]
    marks[0].record()
    for _ in range(times):
        call()
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        if time.monotonic() - started > limit:
            break
    torch.cuda.synchronize(where)
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def in_turn(
    calls: dict[str, Callable], times: int, where: torch.device, queued: bool = False
) -> dict[str, list[float]]:
    """Seconds of each call. The calls are interleaved, so that all see the same machine load."""
    seconds = {name: [] for name in calls}
    for _ in range(times):
        for name, call in calls.items():
            seconds[name] += seconds_of(call, 1, where, queued=queued)
    return seconds


def milliseconds(seconds: list[float]) -> dict:
    """The median and the quartiles of the times, in milliseconds."""
    low, median, high = np.percentile(seconds, (25, 50, 75)) * 1e3
    return {"median_ms": median, "quartiles_ms": [low, high], "times": len(seconds)}


class Memory:
    """Measures the increase in peak memory during a block of code, in bytes; None on a CPU."""

    def __init__(self, where: torch.device):
        self.where, self.bytes = where, None

    def __enter__(self):
        if self.where.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def forget_peak(self):
        """Discards the peak so far, such as that of compiling."""
        if self.where.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *exception):
        if self.where.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.before


def differences(found: dict, reference: dict) -> dict:
    """By name: the largest absolute difference of two tensors, and ‖found − reference‖ / ‖reference‖."""
    report = {}
    for name, value in found.items():
        difference, exact = value.double() - reference[name].double(), reference[name].double()
        relative = (difference.norm() / exact.norm().clamp_min(1e-30)).item()
        report[name] = {"largest": difference.abs().max().item(), "relative": relative}
    return report


def check(report: dict, dtype: torch.dtype) -> None:
    """Raises AssertionError if a relative difference is NaN or exceeds the tolerance for the dtype."""
    limit = LARGEST_DIFFERENCE[str(dtype).removeprefix("torch.")]
    wrong = {name: of["relative"] for name, of in report.items() if not of["relative"] <= limit}
    assert not wrong, f"relative difference from the reference above {limit}: {wrong}"


def die_with_parent() -> None:
    """Makes Linux kill this process when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
