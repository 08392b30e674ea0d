"""Compares our stages with nanoGPT at its own CPU setting: python -m benchmarks.against_nanogpt --nanogpt DIR

DIR is a checkout of karpathy/nanoGPT. All programs train on TinyShakespeare's characters, one at a time in
turns of two seconds while the others are paused, so that all see the same machine load. Then nanoGPT and
stage 0 sample, and a step of Muon is timed against one of AdamW. Writes the section "against_nanogpt" of
results/results.json. Takes about half an hour on two cores.
"""

import importlib.util
import json
import math
import os
import pickle
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import data
from lab import cli, device, stages
from lab.comparison import report, timing
from lab.errors import UserError
from lab.pages import lessons
from lab.sampling import generation
from lab.sampling.compiled import CompiledStep
from lab.storage import runs
from lab.training import batches, evaluation, log, optim, presets

SETTING = "--device=cpu --compile=False --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128"
SETTING += " --lr_decay_iters=2000 --dropout=0.0"
CPU = torch.device("cpu")
TURNS, TURN_SECONDS = 8, 2  # turns of each program per round, and the length of a turn
WARM_UP_STEPS = 30
# On Linux a child inherits its parent's peak memory: start the programs from a process smaller than they are.
SMALL_PARENT = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[2:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(status)
"""
# Settings with which our best stage has to reach nanoGPT's loss: the preset, and shorter, faster schedules.
WAYS = {
    "AdamW, the preset": "",
    "AdamW, 600 steps at 3e-3": "--steps 600 --lr 3e-3 --min-lr 3e-4",
    "Muon, 400 steps at 6e-3": "--steps 400 --lr 6e-3 --min-lr 6e-4 --warmup-steps 50 --optimizer muon",
}


@dataclass
class Settings:
    """Compares training and sampling with nanoGPT."""

    nanogpt: str
    """Folder of a checkout of karpathy/nanoGPT."""
    stages: str = "0,1,2,3,4,5"
    """Our stages. The first one is also compared in loss, memory and sampling."""
    best: str = "4"
    """Our stage that has to reach nanoGPT's final loss."""
    rounds: int = 3
    """Number of interleaved measurements of each program; medians are reported."""
    only: Literal["training", "sampling"] | None = None
    """Measure only the speed of training or of sampling, and keep the other figures."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    nanogpt = Path(settings.nanogpt).resolve()
    if not (nanogpt / "train.py").exists():
        raise UserError(f"{nanogpt} is not a checkout of nanoGPT: it has no train.py")
    dataset = data.load("tinyshakespeare")
    prepare_nanogpt(nanogpt, dataset)
    names = [stages.find(stage) for stage in settings.stages.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        scratch, result = Path(scratch), {}
        if settings.only != "sampling":
            result |= training_ratios(training_speed(nanogpt, names, settings.rounds, scratch), names)
        if settings.only != "training":
            speeds = sampling_speed(nanogpt, names[0], settings.rounds)
            result["sampling_tokens_per_second_at_context_256"] = speeds
        if not settings.only:
            result |= losses(nanogpt, names[0], stages.find(settings.best), dataset, scratch)
            result |= {"stage": names[0], "dataset": dataset.name, "machine": runs.machine(CPU)}
    results = lessons.read_results()
    results["against_nanogpt"] = results.get("against_nanogpt", {}) | result
    runs.write_json(lessons.RESULTS, results)
    print(json.dumps(result, indent=2))


def losses(nanogpt: Path, name: str, best: str, dataset: data.Dataset, scratch: Path) -> dict:
    """Final loss and peak memory of whole runs, seconds to nanoGPT's loss, and the time of a step of Muon."""
    theirs = scratch / "theirs"
    _, their_memory = train_nanogpt(nanogpt, theirs, 2000, 100)
    ours, our_memory = train_ours(name, scratch / "ours")
    their_loss = nanogpt_loss(nanogpt, theirs, dataset)
    our_loss = log.read_metrics(ours / "metrics.jsonl")[-1]["val_loss"]
    return {
        "val_loss_after_2000_steps": {"nanogpt": their_loss, "ours": our_loss},
        "peak_memory_mib": {"nanogpt": their_memory / 2**20, "ours": our_memory / 2**20},
        "seconds_to_nanogpts_loss": race(nanogpt, best, their_loss, 3, scratch),
        "muon_step": muon_step(best, dataset),
    }


def training_ratios(speed: dict[str, list[float]], names: list[str]) -> dict:
    """The figures for results.json from the speeds that training_speed measured."""
    ratios = {name: compare(speed["nanogpt"], values) for name, values in speed.items()}
    compiled = compare(speed["nanogpt, compiled"], speed["compiled"])
    first = ratios[names[0]] | {"compiled": compiled, "machine": runs.machine(CPU)}
    return {
        "rounds": len(speed["nanogpt"]),
        "training_tokens_per_second": first,
        "training_ratio_by_stage": {name: ratios[name]["ratio"] for name in names},
    }


def training_speed(nanogpt: Path, names: list[str], rounds: int, scratch: Path) -> dict[str, list[float]]:
    """Tokens per second in each round: nanoGPT and our stages, and compiled nanoGPT and our first stage."""
    endless = 10**6  # steps, so that no program evaluates or ends
    theirs = f"--max_iters={endless} --eval_interval={endless}"
    with ExitStack() as programs:
        turns = {}
        for name, more in (("nanogpt", []), ("nanogpt, compiled", ["--compile=True"])):
            command = nanogpt_command(nanogpt, scratch / name, 1, *theirs.split(), *more)
            count = partial(nanogpt_steps, scratch / f"{name}.log")
            turns[name] = programs.enter_context(in_turn(command, scratch / f"{name}.log", count))
        for name in (*names, "compiled"):
            stage, more = (names[0], ["--compile"]) if name == "compiled" else (name, [])
            folder = scratch / f"{name}-speed"
            more = ("--steps", str(endless), "--eval-every", str(endless), "--log-every", "1", *more)
            command = our_command(stage, folder, *more)
            count = partial(our_steps, folder)
            turns[name] = programs.enter_context(in_turn(command, scratch / f"{name}.log", count))
        speed = {name: [] for name in turns}
        for _ in range(rounds):
            steps = dict.fromkeys(turns, 0)
            for _ in range(TURNS):
                for name, turn in turns.items():
                    steps[name] += turn()
            for name, number in steps.items():
                speed[name].append(12 * 64 * number / (TURNS * TURN_SECONDS))
            print({name: round(values[-1]) for name, values in speed.items()}, flush=True)
    return speed


@contextmanager
def in_turn(command: list, output: Path, steps: Callable[[], int]):
    """Starts a training program and pauses it; yields a function that runs it for one turn.

    The function returns the number of steps made in the turn, as counted by `steps`.
    """
    with open(output, "w") as file:
        process = subprocess.Popen(
            command[1:],
            cwd=command[0],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    try:
        while steps() < WARM_UP_STEPS:
            if process.poll() is not None:
                raise failure(command, output)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGSTOP)

        def turn() -> int:
            before = steps()
            os.killpg(process.pid, signal.SIGCONT)
            time.sleep(TURN_SECONDS)
            os.killpg(process.pid, signal.SIGSTOP)
            if process.poll() is not None:
                raise failure(command, output)
            return steps() - before

        yield turn
    finally:
        with suppress(ProcessLookupError):  # it may have exited already
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def nanogpt_steps(printed: Path) -> int:
    """The number of steps that nanoGPT has printed."""
    return printed.read_text().count("\niter ")


def our_steps(folder: Path) -> int:
    """The last step in our metrics; 0 before the first."""
    lines = log.read_metrics(folder / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def race(nanogpt: Path, stage: str, loss: float, rounds: int, scratch: Path) -> dict:
    """Median seconds of nanoGPT's 2000 steps, and of ours to the same loss in each setting of WAYS.

    None if a setting does not reach that loss. nanoGPT's time is extrapolated from 300 steps, which are
    measured before each of our runs.
    """
    theirs, ours, ratios = [], {way: [] for way in WAYS}, {way: [] for way in WAYS}
    for round_ in range(rounds):
        for number, (way, flags) in enumerate(WAYS.items()):
            name = f"{number}-{round_}"
            seconds, _ = train_nanogpt(nanogpt, scratch / f"paced{name}", 300, 1)
            theirs.append(2000 * statistics.median(seconds))
            more = ("--eval-every", "50", *flags.split())
            folder, _ = train_ours(stage, scratch / f"way{name}", *more)
            reached = report.seconds_to(log.read_metrics(folder / "metrics.jsonl"), loss)
            ours[way].append(reached or math.inf)
            ratios[way].append(ours[way][-1] / theirs[-1])
            print(way, {"nanogpt": round(theirs[-1]), "ours": ours[way][-1]}, flush=True)
    raced = {"stage": stage, "nanogpt": statistics.median(theirs), "rounds": rounds, "ours": {}}
    for way in WAYS:
        seconds, ratio = statistics.median(ours[way]), statistics.median(ratios[way])
        reached = math.isfinite(seconds)
        raced["ours"][way] = (
            {"seconds": seconds, "ratio": ratio} if reached else dict.fromkeys(("seconds", "ratio"))
        )
    return raced


def muon_step(name: str, dataset: data.Dataset, rounds: int = 11, steps: int = 30) -> dict:
    """Milliseconds of a step with AdamW and with Muon, interleaved, on the laptop preset, and their ratio."""
    device.prepare(CPU)
    stage, preset = stages.load(name), presets.PRESETS["laptop"]
    config = stage.GPTConfig(vocab_size=dataset.tokenizer.vocab_size, **preset["model"])
    autocast = device.autocast(CPU, device.choose_dtype("auto", CPU))
    models = {kind: stage.GPT(config) for kind in ("adamw", "muon")}
    optimizers = {kind: optim.make(kind, model, 1e-3, 0.1, (0.9, 0.99)) for kind, model in models.items()}
    done = dict.fromkeys(models, 0)

    def train(kind):
        for _ in range(steps):
            idx, targets = batches.train_batch(
                dataset.train, 0, done[kind], preset["batch_size"], config.block_size
            )
            optim.accumulate_gradients(models[kind], idx, targets, preset["batch_size"], autocast)
            optim.update(models[kind], optimizers[kind], 1e-3, 1.0)
            done[kind] += 1

    seconds = timing.in_turn({kind: partial(train, kind) for kind in models}, rounds, CPU, warm_ups=1)
    milliseconds = {kind: 1e3 * statistics.median(times) / steps for kind, times in seconds.items()}
    ratio = timing.median_ratio(seconds["muon"], seconds["adamw"])
    return {"stage": name} | milliseconds | {"ratio": ratio, "rounds": rounds}


def compare(theirs: list[float], ours: list[float]) -> dict:
    """Both medians, and the median of the ratios of consecutive measurements."""
    return {
        "nanogpt": statistics.median(theirs),
        "ours": statistics.median(ours),
        "ratio": timing.median_ratio(ours, theirs),
        "ratios": [round(b / a, 3) for a, b in zip(theirs, ours, strict=True)],
    }


def prepare_nanogpt(nanogpt: Path, dataset: data.Dataset) -> None:
    """Gives nanoGPT our token files."""
    folder = nanogpt / "data" / "shakespeare_char"
    for split in ("train", "val"):
        shutil.copy(dataset.folder / f"{split}.bin", folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": dataset.tokenizer.vocab_size}))


def timed(command: list[str], folder: Path) -> tuple[str, int]:
    """Runs a command; returns its output and its peak memory in bytes."""
    output, memory = folder.with_suffix(".log"), folder.with_suffix(".memory")
    with open(output, "w") as file:
        started = [sys.executable, "-c", SMALL_PARENT, memory, *command[1:]]
        status = subprocess.call(started, cwd=command[0], stdout=file, stderr=subprocess.STDOUT)
    if status:
        raise failure(command, output)
    return output.read_text(), int(memory.read_text()) * 1024


def failure(command: list, output: Path) -> UserError:
    """The error for a failed command, with the end of its output."""
    return UserError(f"{' '.join(map(str, command))} failed:\n{output.read_text()[-2000:]}")


def nanogpt_command(nanogpt: Path, out: Path, log_interval: int, *more: str) -> list:
    """The working folder, and the command that runs nanoGPT's own train.py."""
    flags = [*SETTING.split(), "--eval_iters=20", f"--log_interval={log_interval}", f"--out_dir={out}", *more]
    return [nanogpt, sys.executable, "train.py", "config/train_shakespeare_char.py", *flags]


def our_command(stage: str, out: Path, *more: str) -> list:
    """The working folder, and the command that runs our train.py with the laptop preset."""
    flags = ["--stage", stage, "--preset", "laptop", "--device", "cpu", "--out", str(out), *more]
    return [stages.ROOT, sys.executable, "train.py", *flags]


def train_nanogpt(nanogpt: Path, out: Path, steps: int, log_interval: int) -> tuple[list[float], int]:
    """Runs nanoGPT's own train.py; returns the seconds of its steps and its peak memory in bytes."""
    command = nanogpt_command(nanogpt, out, log_interval, f"--max_iters={steps}")
    printed, memory = timed(command, out)
    # Drop the first steps, which warm up. Times that include an evaluation do not affect the median.
    return [float(ms) / 1e3 for ms in re.findall(r"time ([\d.]+)ms", printed)][10:], memory


def train_ours(stage: str, out: Path, *more: str) -> tuple[Path, int]:
    """Runs our train.py with the laptop preset; returns the run's folder and its peak memory in bytes."""
    _, memory = timed(our_command(stage, out, *more), out)
    return out, memory


def load_nanogpt(nanogpt: Path):
    """Imports nanoGPT's model.py."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", nanogpt / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nanogpt_loss(nanogpt: Path, out: Path, dataset: data.Dataset) -> float:
    """The loss of nanoGPT's checkpoint on the whole validation split, computed with our evaluation."""
    module = load_nanogpt(nanogpt)
    saved = torch.load(out / "ckpt.pt", weights_only=True)
    model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])

    class Adapter(torch.nn.Module):
        config = model.config

        def forward(self, idx, targets):
            logits, loss = model(idx, targets)
            return logits, {"next_token": loss}

    autocast = device.autocast(CPU, torch.float32)
    return evaluation.next_token_loss(Adapter().eval(), np.asarray(dataset.val), 10**6, 64, autocast, CPU)


def sampling_speed(nanogpt: Path, name: str, rounds: int, n_tokens: int = 500) -> dict:
    """Tokens per second of untrained models of the laptop preset with a context of 256, interleaved."""
    sizes = {"vocab_size": 65, "block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 128}
    module, stage = load_nanogpt(nanogpt), stages.load(name)
    theirs = module.GPT(module.GPTConfig(**sizes, dropout=0.0, bias=False)).eval()
    ours = stage.GPT(stage.GPTConfig(**sizes)).eval()
    step = CompiledStep(ours)

    def their_way():
        with torch.no_grad():
            theirs.generate(torch.zeros(1, 1, dtype=torch.int64), n_tokens, temperature=0.8, top_k=200)

    def our_way(step=None):
        list(generation.generate(ours, [0], n_tokens, 65, temperature=0.8, top_k=200, step=step))

    ways = {"nanogpt": their_way, "ours": our_way, "compiled": lambda: our_way(step)}
    seconds = timing.in_turn(ways, rounds, CPU)
    speed = {name: [n_tokens / one for one in times] for name, times in seconds.items()}
    compiled = compare(speed["nanogpt"], speed["compiled"]) | {"compile_seconds": step.seconds}
    return compare(speed["nanogpt"], speed["ours"]) | {"compiled": compiled, "machine": runs.machine(CPU)}


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # else the paused programs would outlive this one
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    cli.run(main)
