"""What sample.py --compile gains and costs, from its start to its end: python -m benchmarks.compiled_sampling

Each row is one run and one length of text. In turn, so that noise affects all alike: sample.py without
--compile, a first start with it (nothing is compiled yet), and a later start (an earlier one compiled all).
Writes the section "compiled_sampling" of results/results.json. Keep the machine otherwise idle: compiling
takes what the text leaves of it.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import sample
from lab import cli
from lab.comparison import timing
from lab.errors import UserError, shown
from lab.pages import lessons
from lab.storage import runs

ROUNDS = {"without": [], "first start": ["--compile"], "later start": ["--compile"]}


@dataclass
class Settings:
    """Measures how long sample.py takes on the CPU with and without --compile."""

    runs: tuple[str, ...] = ()
    """Folders of the runs."""
    tokens: tuple[int, ...] = (50, 500, 2000)
    """Tokens of a text."""
    rounds: int = 3
    """Number of interleaved measurements; medians are reported."""


@dataclass
class Measured:
    """One call of sample.py."""

    seconds: float
    first_token: float
    """Seconds until the first token."""
    text: bytes


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    if not settings.runs:
        raise UserError("name the runs to measure: --runs runs/NAME ...")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for run in map(Path, settings.runs):
            for n_tokens in settings.tokens:
                rows.append(measured(run, n_tokens, settings.rounds, Path(folder)))
                print(json.dumps(rows[-1]), flush=True)
    results = lessons.read_results()
    machine = runs.machine(torch.device("cpu"))
    results["compiled_sampling"] = {"calls": rows, "rounds": settings.rounds, "machine": machine}
    runs.write_json(lessons.RESULTS, results)


def measured(run: Path, n_tokens: int, rounds: int, folder: Path) -> dict:
    """Medians of one run and one length of text: seconds of a whole call and until its first token."""
    kept = folder / "kept"
    call(run, n_tokens, ["--compile-first"], kept)
    found = {name: [] for name in ROUNDS}
    for _ in range(rounds):
        for name, flags in ROUNDS.items():
            with tempfile.TemporaryDirectory(dir=folder) as fresh:
                found[name].append(call(run, n_tokens, flags, kept if name == "later start" else Path(fresh)))
    seconds = {name: [each.seconds for each in calls] for name, calls in found.items()}
    first_token = {name: [each.first_token for each in calls] for name, calls in found.items()}
    ratios = {name: timing.median_ratio(seconds[name], seconds["without"]) for name in seconds}
    return {
        "stage": runs.read_config(run)["stage"],
        "tokens": n_tokens,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "of_the_time_without": ratios,
        "first_token_seconds": {name: statistics.median(values) for name, values in first_token.items()},
        "same_text": len({each.text for calls in found.values() for each in calls}) == 1,
    }


def call(run: Path, n_tokens: int, flags: list[str], folder: Path) -> Measured:
    """Calls sample.py. folder: where it finds and leaves compiled code, torch's own cache included."""
    prompt = "a"
    command = [sys.executable, sample.__file__, "--run", run, "--prompt", prompt, "--device", "cpu"]
    command += ["--temperature", "0", "--ignore-eos", "--max-new-tokens", str(n_tokens), *flags]
    places = {"XDG_CACHE_HOME": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "torch")}
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=os.environ | places, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    )
    text = process.stdout.read(len(prompt))
    text += process.stdout.read(1)
    first_token = time.perf_counter() - started
    while part := process.stdout.read(1 << 16):
        text += part
    if process.wait():
        raise UserError(f"sample.py failed for {shown(run)}: call it yourself to see why")
    return Measured(time.perf_counter() - started, first_token, text)


if __name__ == "__main__":
    cli.run(main)
