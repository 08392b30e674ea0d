"""Speed and memory of several stages, measured in turn after a warm-up, so that noise affects all alike."""

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

import data
from lab import device as devices
from lab import formats, stages
from lab.comparison import isolated, timing, wanted_runs
from lab.errors import UserError, shown
from lab.sampling import generation
from lab.storage import edits, runs
from lab.training import optim, settings

DECODED = 200  # tokens per measurement of decoding speed


def parse_contexts(text: str) -> list[int]:
    """The lengths in a list such as "64,256,1024". Raises UserError for anything else."""
    try:
        contexts = [int(part) for part in text.split(",") if part]
        if any(context < 3 for context in contexts):
            raise ValueError
    except ValueError:
        raise UserError(
            f"--contexts {text}: give lengths of 3 or more, separated by commas, as in 64,256,1024"
        ) from None
    return contexts


def read(out: Path, notes: list[str]) -> dict:
    """Earlier measurements of the current code. A line is added to notes for those of other code."""
    path = out / "speeds.json"
    try:
        speeds = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{shown(path)} is damaged: {error}") from None
    formats.check(speeds, formats.RESULTS, shown(path))
    measured, codes = speeds.get("training", {}), speeds.get("code", {})
    outdated = [name for name in measured if not is_todays(name, codes.get(name))]
    if outdated:
        notes.append(
            f"left out: the speeds of {', '.join(outdated)} in {shown(path)}, measured with other code"
        )
    return {key: without(value, outdated) for key, value in speeds.items()}


def is_todays(name: str, code: str | None) -> bool:
    """Whether a stage's code has this hash."""
    try:
        return name in stages.names() and edits.code_hash(name) == code
    except UserError:  # it cannot be parsed at the moment
        return False


def without(value, outdated: list[str]):
    """A part of speeds.json without these stages."""
    if not isinstance(value, dict):
        return value
    return {name: figure for name, figure in value.items() if name not in outdated}


def everything(
    configs: dict[str, dict], device: torch.device, rounds: int, contexts: list[int], console: Console
) -> dict:
    """Measures all speeds of these stages. configs: by stage, the config.json of one of its runs."""
    with console.status("measuring training and decoding speed", spinner="line"):
        trainers = {name: trainer(config, device) for name, config in configs.items()}
        training = speeds_in_turn(trainers, device, rounds, 15)
        decoders = {name: decoder(config, device) for name, config in configs.items()}
        decoding = speeds_in_turn(decoders, device, rounds, DECODED)
    speeds = {
        "format": formats.RESULTS,
        "rounds": rounds,
        "machine": runs.machine(device),
        "code": {name: edits.code_hash(name) for name in configs},
        "training": training,
        "decoding": decoding,
        "peak_memory": {},
    }
    for name, config in configs.items():
        with console.status(f"measuring {name}'s memory", spinner="line"):
            chosen = config["settings"]
            batch = chosen["micro_batch_size"] or chosen["batch_size"]
            made = isolated.measure(
                **of_run(config, device), context=config["model"]["block_size"], batch_size=batch
            )
        if "error" in made:
            console.print(f"not measured: {name}'s memory: {made['error']}", highlight=False)
        else:
            speeds["peak_memory"][name] = made["peak_memory"]
    for what in ("training", "decoding"):
        speeds[f"{what}_by_context"] = by_context(configs, what, device, min(rounds, 3), contexts, console)
    return speeds


def of_run(config: dict, device: torch.device) -> dict:
    """The settings of lab.comparison.isolated that measure a run's model."""
    made = {"stage": config["stage"], "model": json.dumps(config["model"]), "dtype": config["dtype"]}
    return made | {"device": device, "optimizer": config["settings"]["optimizer"]}


def by_context(
    configs: dict[str, dict],
    what: str,
    device: torch.device,
    rounds: int,
    contexts: list[int],
    console: Console,
) -> dict[str, dict]:
    """Tokens/s of training or decoding, and the memory of the process or the cache, by stage and context.

    Each measurement has a process of its own. The stages take turns for several rounds; the medians count.
    """
    results = {name: {str(context): [] for context in contexts} for name in configs}
    for _ in range(rounds):
        for context in contexts:
            for name, config in configs.items():
                status = f"measuring {what} of {name} at a context of {context}"
                with console.status(status, spinner="line"):
                    steps = 5 if what == "training" else 30
                    one = isolated.measure(**of_run(config, device), what=what, context=context, steps=steps)
                results[name][str(context)].append(one)
    memory = "peak_memory" if what == "training" else "cache_bytes"
    measured = {}
    for name, by_length in results.items():
        for context, repeats in by_length.items():
            errors = [one["error"] for one in repeats if "error" in one]
            if errors:
                message = f"not measured: {what} of {name} at a context of {context}: {errors[0]}"
                console.print(message, highlight=False)
            elif repeats:
                point = {"tokens_per_second": statistics.median(one["tokens_per_second"] for one in repeats)}
                point["memory"] = statistics.median(one[memory] for one in repeats)
                measured.setdefault(name, {})[context] = point
    return measured


def seconds_of_runs(left: list[wanted_runs.Run], device: torch.device) -> float:
    """About how long these runs take, one after another, from a few steps of each stage."""
    per_token, total = {}, 0.0
    for run in left:
        chosen = run.settings
        text = data.load(chosen.data, chosen.tokenizer)
        if chosen.stage not in per_token:
            per_token[chosen.stage] = seconds_per_token(chosen, text.tokenizer.vocab_size, device)
        steps = chosen.steps - run.step()
        trained = steps * chosen.batch_size * chosen.sequence_length
        evaluated = min(chosen.eval_tokens, len(text.val)) * (steps / chosen.eval_every)
        total += per_token[chosen.stage] * (trained + evaluated / 3)  # only the forward pass: a third
    return total


def seconds_per_token(chosen: settings.Settings, vocab_size: int, device: torch.device) -> float:
    """Seconds of training per token, from a few steps of at most 2,048 tokens or one sequence."""
    batch = max(1, min(chosen.batch_size, 2048 // chosen.model.block_size))
    sizes = {"batch_size": batch, "micro_batch_size": batch, "optimizer": chosen.optimizer}
    dtype = str(devices.choose_dtype(chosen.dtype, device)).removeprefix("torch.")
    config = {"stage": chosen.stage, "model": vars(chosen.model) | {"vocab_size": vocab_size}}
    step = trainer(config | {"settings": sizes, "dtype": dtype}, device)
    tokens = step(1)
    seconds = timing.seconds_of(partial(step, 1), 5, device, warm_ups=2)
    return statistics.median(seconds) / tokens


def of_stage(speeds: dict, name: str) -> dict:
    """The figures of one stage, for results.json; empty if nothing was measured."""
    figures = {}
    for what in ("training", "decoding"):
        values = speeds.get(what, {}).get(name)
        if values:
            figures[f"{what}_tokens_per_second"] = {"median": statistics.median(values), "values": values}
    if name in speeds.get("peak_memory", {}):
        figures["peak_memory"] = speeds["peak_memory"][name]
    return figures


def speeds_in_turn(
    measured: dict[str, Callable[[int], int]], device: torch.device, rounds: int, amount: int
) -> dict[str, list[float]]:
    """The tokens/s of each function in each round, after a shorter warm-up call.

    A function is called with `amount` and returns the number of tokens that it processed.
    """
    for function in measured.values():
        function(max(2, amount // 5))
    tokens = {}

    def run(name: str) -> None:
        tokens[name] = measured[name](amount)

    seconds = timing.in_turn({name: partial(run, name) for name in measured}, rounds, device)
    return {name: [tokens[name] / one for one in of] for name, of in seconds.items()}


def make_model(config: dict, device: torch.device) -> torch.nn.Module:
    """A newly initialized model with a run's sizes."""
    torch.manual_seed(0)
    devices.prepare(device)
    stage = stages.load(config["stage"])
    return stage.GPT(stage.GPTConfig(**config["model"])).to(device)


def trainer(config: dict, device: torch.device) -> Callable[[int], int]:
    """A function that trains for a number of steps as train.py does, uncompiled, and returns the tokens."""
    model, chosen = make_model(config, device), config["settings"]
    optimizer = optim.make(chosen["optimizer"], model, 1e-3, 0.1, (0.9, 0.99))
    autocast = devices.autocast(device, getattr(torch, config["dtype"]))
    context, batch = model.config.block_size, chosen["batch_size"]
    text = torch.randint(model.config.vocab_size, (batch, context + 1), device=device)

    def run(steps: int) -> int:
        for _ in range(steps):
            micro_batch = chosen["micro_batch_size"] or batch
            optim.accumulate_gradients(model, text[:, :-1], text[:, 1:], micro_batch, autocast)
            optim.update(model, optimizer, 1e-3, 1.0)
            if hasattr(model, "after_step"):
                model.after_step()
        return steps * batch * context

    return run


def decoder(config: dict, device: torch.device) -> Callable[[int], int]:
    """A function that samples a number of tokens one by one, as sample.py does, and returns their number."""
    model = make_model(config, device).eval()

    def run(tokens: int) -> int:
        generator = torch.Generator().manual_seed(0)
        return sum(
            1 for _ in generation.generate(model, [0], tokens, model.config.vocab_size, generator=generator)
        )

    return run
