"""Speed and memory of the stages side by side: warmed up, repeated, in turn, so that noise is fair to all."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from lab import device, optim, runs, sampling, stages, throughput
from lab.errors import UserError, shown

DEVICE = device.choose("auto")
DECODED = 200  # tokens of one measurement of decoding


def parse_contexts(text: str) -> list[int]:
    """The lengths in "64,256,1024"; a UserError for anything else."""
    try:
        contexts = [int(part) for part in text.split(",") if part]
        if any(context < 2 for context in contexts):
            raise ValueError
    except ValueError:
        raise UserError(
            f"--contexts {text}: write lengths of 2 or more with commas, as in 64,256,1024"
        ) from None
    return contexts


def read(out: Path) -> dict:
    """What was measured before; empty where nothing was."""
    path = out / "speeds.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{shown(path)} is damaged: {error}") from None


def everything(configs: dict[str, dict], rounds: int, contexts: list[int], console: Console) -> dict:
    """All speeds of these stages; configs: by stage, config.json of a run of it."""
    with console.status("measuring training and decoding speed"):
        training = in_turn({name: trainer(config) for name, config in configs.items()}, rounds, 15)
        decoding = in_turn({name: decoder(config) for name, config in configs.items()}, rounds, DECODED)
    speeds = {
        "rounds": rounds,
        "machine": runs.machine(DEVICE),
        "training": training,
        "decoding": decoding,
        "peak_memory": {},
        "training_by_context": {},
        "decoding_by_context": {},
    }
    for name, config in configs.items():
        with console.status(f"measuring {name}'s memory, and its speed against the context"):
            settings, model = config["settings"], config["model"]
            common = {"stage": name, "preset": settings["preset"], "vocab_size": model["vocab_size"]}
            batch = settings["micro_batch_size"] or settings["batch_size"]
            made = throughput.measure(**common, context=model["block_size"], batch_size=batch)
            if "error" not in made:
                speeds["peak_memory"][name] = made["peak_memory"]
            for what in ("training", "decoding"):
                points = {}
                for context in contexts:
                    made = throughput.measure(
                        **common, what=what, context=context, steps=5 if what == "training" else 30
                    )
                    if "error" not in made:
                        memory = made["peak_memory"] if what == "training" else made["cache_bytes"]
                        points[str(context)] = {
                            "tokens_per_second": made["tokens_per_second"],
                            "memory": memory,
                        }
                if points:
                    speeds[f"{what}_by_context"][name] = points
    return speeds


def of_stage(speeds: dict, name: str) -> dict:
    """The figures of one stage, for results.json; empty where nothing was measured."""
    figures = {}
    for what in ("training", "decoding"):
        values = speeds.get(what, {}).get(name)
        if values:
            figures[f"{what}_tokens_per_second"] = {"median": statistics.median(values), "values": values}
    if name in speeds.get("peak_memory", {}):
        figures["peak_memory"] = speeds["peak_memory"][name]
    return figures


def in_turn(measured: dict[str, Callable], rounds: int, amount: int) -> dict[str, list[float]]:
    """Calls each function with `amount` once a round, after a warm-up: what it returns, tokens a second."""
    speeds = {name: [] for name in measured}
    for function in measured.values():
        function(max(2, amount // 5))
    for _ in range(rounds):
        for name, function in measured.items():
            started = time.perf_counter()
            tokens = function(amount)
            device.synchronize(DEVICE)
            speeds[name].append(tokens / (time.perf_counter() - started))
    return speeds


def make_model(config: dict) -> torch.nn.Module:
    """A fresh model of a run's sizes."""
    torch.manual_seed(0)
    device.prepare(DEVICE)
    stage = stages.load(config["stage"])
    return stage.GPT(stage.GPTConfig(**config["model"])).to(DEVICE)


def trainer(config: dict) -> Callable[[int], int]:
    """A function that trains so many steps, as train.py would without compiling, and returns the tokens."""
    model, settings = make_model(config), config["settings"]
    optimizer = optim.adamw(model, 1e-3, 0.1, (0.9, 0.99))
    autocast = device.autocast(DEVICE, getattr(torch, config["dtype"]))
    context, batch = model.config.block_size, settings["batch_size"]
    text = torch.randint(model.config.vocab_size, (batch, context + 1), device=DEVICE)

    def run(steps: int) -> int:
        for _ in range(steps):
            micro_batch = settings["micro_batch_size"] or batch
            optim.accumulate_gradients(model, text[:, :-1], text[:, 1:], micro_batch, autocast)
            optim.update(model, optimizer, 1e-3, 1.0)
            if hasattr(model, "after_step"):
                model.after_step()
        return steps * batch * context

    return run


def decoder(config: dict) -> Callable[[int], int]:
    """A function that samples so many tokens one by one, as sample.py would, and returns their number."""
    model = make_model(config).eval()

    def run(tokens: int) -> int:
        generator = torch.Generator().manual_seed(0)
        return sum(
            1 for _ in sampling.generate(model, [0], tokens, model.config.vocab_size, generator=generator)
        )

    return run
