"""Trains every stage with the gpt2 preset for a few steps on a CPU: python -m benchmarks.gpt2_preset

Runs `train.py` for each stage, on a text that is first converted to parquet files. Updates the section
"gpt2_preset" of results/results.json after each stage, so --stages can measure the missing ones later.
Afterwards `python -m lab.pages.lessons` writes the table into docs/scale.md. Takes two minutes or more per
stage on two cores, and up to 8 GB of memory.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import data
from data import files, tokenizers
from lab import cli, optional, stages
from lab.comparison import wanted_runs
from lab.errors import UserError
from lab.pages import lessons
from lab.storage import runs
from lab.training import log

DOCUMENT = 4900  # characters, the mean of OpenWebText's documents
FLAGS = "--preset gpt2 --tokenizer gpt2 --device cpu --batch-size 1 --micro-batch-size 1 --log-every 1"


@dataclass
class Settings:
    """Trains every stage with the gpt2 preset for a few steps on a CPU, and records speed and memory."""

    text: str | None = None
    """UTF-8 text file to train on. None: TinyShakespeare, as in train.py."""
    stages: str | None = None
    """Stages to train, as in 0-3 or 6,7a. None: all."""
    steps: int = 20
    """Optimizer steps of one sequence of 1024 tokens each."""
    machine_shared: bool = False
    """Record that the machine was also doing other work, so that the speeds are lower bounds."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    names = wanted_runs.chosen_stages(settings.stages)
    if settings.text:
        text = files.read_text(Path(settings.text))
    else:
        dataset = data.load("tinyshakespeare")
        text = "".join(dataset.tokenizer.decode(part) for part in (dataset.train, dataset.val))
    kept = [path.resolve() for path in tokenizers.gpt2_files()]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        os.environ["DATA_DIR"] = str(scratch / "data")  # keep the sample's tokens out of the real data folder
        for path in kept:
            files.write(files.root() / "cache" / path.name, path.read_bytes())
        write_parquet(scratch / "sample", text)
        for name in names:
            measured = train(name, scratch / "sample", scratch / name, settings.steps)
            record(name, measured | {"machine_shared": settings.machine_shared}, settings.steps)
            print(name, measured, flush=True)


def record(name: str, measured: dict, steps: int) -> None:
    """Adds a stage to results.json. Drops earlier results of another processor, commit or number of steps."""
    made = {"steps": steps, "tokens_per_step": 1024, "machine": runs.machine(torch.device("cpu"))}
    results = lessons.read_results()
    before = results.get("gpt2_preset", made | {"stages": {}})
    alike = before["steps"] == steps
    for field in ("processor", "commit"):
        alike = alike and before["machine"][field] == made["machine"][field]
    by_stage = (before["stages"] if alike else {}) | {name: measured}
    in_order = {name: by_stage[name] for name in stages.names() if name in by_stage}
    results["gpt2_preset"] = made | {"stages": in_order}
    runs.write_json(lessons.RESULTS, results)


def write_parquet(folder: Path, text: str) -> None:
    """Writes the text as two parquet files, in documents of OpenWebText's mean length."""
    pyarrow = optional.load("pyarrow", extra="owt", needed_for="writing the sample")
    parquet = optional.load("pyarrow.parquet", extra="owt", needed_for="writing the sample")
    folder.mkdir()
    documents = [text[start : start + DOCUMENT] for start in range(0, len(text), DOCUMENT)]
    for number in range(2):
        table = pyarrow.table({"text": documents[number::2]})
        parquet.write_table(table, folder / f"sample-{number}.parquet")


def train(name: str, sample: Path, out: Path, steps: int) -> dict:
    """Runs train.py and returns its figures. If it fails, raises UserError with its last lines of output."""
    flags = [*FLAGS.split(), "--data", str(sample), "--steps", str(steps), "--eval-tokens", "1024"]
    command = [sys.executable, "train.py", "--stage", name, *flags, "--out", str(out)]
    output = out.with_suffix(".log")
    with open(output, "w") as file:
        process = subprocess.Popen(command, cwd=stages.ROOT, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        last = output.read_text().strip().splitlines()[-2:]
        raise UserError(f"train.py --stage {name} failed: " + "\n".join(last))
    lines, config = log.read_metrics(out / "metrics.jsonl"), runs.read_config(out)
    per_kib = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux, in bytes on macOS
    return {
        "parameters": config["parameters"],
        "active_parameters": config["active_parameters"],
        "dtype": config["dtype"],
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
        "seconds": lines[-1]["seconds"],
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        "peak_memory": usage.ru_maxrss * per_kib,
    }


if __name__ == "__main__":
    cli.run(main)
