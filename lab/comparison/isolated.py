"""Measures the speed and memory of one stage at one context, in a process of its own.

python -m lab.comparison.isolated --help lists the settings.

A process cannot reset its peak memory, so `measure` starts a new process for every measurement.
"""

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # first, since importing torch takes seconds

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

from lab import attention, cli, stages
from lab import device as devices
from lab.comparison import timing
from lab.storage import runs
from lab.training import optim, presets

LAPTOP = presets.PRESETS["laptop"]["model"] | {"vocab_size": 65}


@dataclass
class Settings:
    """Measures one stage at one context and prints the result as a line of JSON."""

    stage: str
    """Stage: its number or name."""
    what: Literal["training", "forward", "decoding"] = "training"
    """training: optimizer steps; forward: passes over the context, without gradients; decoding: tokens one by
    one, until the context is full."""
    context: int = 64
    """Tokens per sequence."""
    batch_size: int = 1
    """Sequences per batch."""
    model: str | None = None
    """Sizes of the model as JSON, as in a run's config.json. None: the laptop preset's."""
    attention_kernel: Literal["auto", "explicit", "sdpa", "tiled", "triton"] = "auto"
    """As in train.py."""
    device: str = "auto"
    """cuda, mps or cpu; auto: the first of these that is available."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products in training, as in train.py."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """As in train.py."""
    steps: int = 5
    """Steps (or tokens) to time, after one that is not timed; the median counts."""
    clock: Literal["wall", "processor"] = "wall"
    """processor: processor time; with one thread, other programs hardly change it."""


def measure(**settings) -> dict:
    """Runs this module with these settings in a process of its own. Returns its result, or {"error": …}."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]
    command = [sys.executable, "-m", "lab.comparison.isolated", *flags]
    child = subprocess.run(command, cwd=stages.ROOT, capture_output=True, text=True)
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return {"error": (errors or lines)[-1]}
    return json.loads(child.stdout.splitlines()[-1])


@devices.memory_errors("try a lower --batch-size or --context, or smaller sizes in --model")
def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    device = devices.choose(settings.device)
    dtype = devices.choose_dtype(settings.dtype, device)
    devices.prepare(device)
    torch.manual_seed(0)
    stage = stages.load(stages.find(settings.stage))
    sizes = json.loads(settings.model) if settings.model else LAPTOP
    sizes |= {"block_size": settings.context, "dropout": 0.0}
    config = stage.GPTConfig(**sizes)
    attention.use(settings.attention_kernel, stage, config, device)
    model = stage.GPT(config).to(device)
    idx = torch.randint(model.config.vocab_size, (settings.batch_size, settings.context + 1), device=device)
    autocast = devices.autocast(device, dtype)
    if settings.what == "training":  # torch's optimizers import torch.compile: that is no memory of the step
        optimizer = optim.make(settings.optimizer, model, 1e-3, 0.1, (0.9, 0.99))
    clock = time.process_time if settings.clock == "processor" else None
    before = devices.peak_memory(device)
    if settings.what == "training":
        seconds, tokens = training(model, optimizer, idx, settings.steps, autocast, device, clock)
    elif settings.what == "forward":
        seconds, tokens = forward(model, idx, settings.steps, autocast, device, clock)
    else:
        dtype = model.lm_head.weight.dtype  # as in sample.py, which does not use autocast
        seconds, tokens = decoding(model, idx, settings.steps, device, clock)
    result = {
        "tokens_per_second": tokens / statistics.median(seconds),
        "peak_memory": devices.peak_memory(device),
        "memory_before": before,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if settings.what == "decoding":
        cache = model.new_cache(settings.batch_size, settings.context)
        result["cache_bytes"] = cache.nbytes
    print(json.dumps(result | {"machine": runs.machine(device)}))


def training(model, optimizer, idx, steps, autocast, device, clock) -> tuple[list[float], int]:
    """Seconds of each optimizer step, and the number of tokens per step."""
    model.train()

    def step():
        optim.accumulate_gradients(model, idx[:, :-1], idx[:, 1:], len(idx), autocast)
        optim.update(model, optimizer, 1e-3, 1.0)

    return timing.seconds_of(step, steps, device, warm_ups=1, clock=clock), idx[:, 1:].numel()


@torch.no_grad()
def forward(model, idx, steps, autocast, device, clock) -> tuple[list[float], int]:
    """Seconds of each pass over the whole context, as for a prompt, and the number of its tokens."""
    model.eval()

    def step():
        with autocast:
            model(idx[:, :-1])

    return timing.seconds_of(step, steps, device, warm_ups=1, clock=clock), idx[:, 1:].numel()


@torch.no_grad()
def decoding(model, idx, steps, device, clock) -> tuple[list[float], int]:
    """Seconds of each decoding step with a nearly full cache, and the tokens per step (one per sequence)."""
    model.eval()
    context = idx.size(1) - 1
    cache = model.new_cache(len(idx), context)
    model(idx[:, : max(1, context - steps - 1)], cache=cache)

    def step():
        logits, _ = model(idx[:, cache.length : cache.length + 1], cache=cache)
        logits.argmax(-1)

    steps = min(steps, context - cache.length - 1)
    return timing.seconds_of(step, steps, device, warm_ups=1, clock=clock), len(idx)


if __name__ == "__main__":
    cli.run(main)
