"""Measures the stages side by side into results/results.json: python results/measure.py --runs runs

Losses come from finished runs of the laptop preset on TinyShakespeare, any number of seeds; speeds are
measured here, the stages in turn, so that a noisy machine is fair to all. Then `python -m lab.lessons`
writes the tables into the pages.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import data
from lab import (
    batches,
    checkpoint,
    cli,
    cost,
    device,
    lessons,
    log,
    optim,
    plots,
    presets,
    runs,
    sampling,
    stages,
)
from lab.errors import UserError

CPU = torch.device("cpu")


@dataclass
class Settings:
    """Measures all stages side by side."""

    runs: str = "runs"
    """Folder with the finished runs."""
    rounds: int = 7
    """Times that each stage is measured, in turn; medians are reported."""
    steps: int = 30
    """Training steps in a round."""
    tokens: int = 250
    """Tokens sampled in a round, with a context of 256."""


def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    dataset = data.load("tinyshakespeare")
    device.prepare(CPU)
    histories = {name: finished_runs(Path(settings.runs), name) for name in stages.names().values()}
    plots.validation_curves(histories, lessons.RESULTS.parent / "val_loss.png")
    losses = {number: final_losses(histories[name]) for number, name in stages.names().items()}
    results = lessons.read_results()
    results["machine"] = runs.machine(CPU)
    results["dataset"] = dataset.name
    results["stages"] = {str(number): costs(name) for number, name in stages.names().items()}
    trainers = {number: trainer(name, dataset) for number, name in stages.names().items()}
    samplers = {number: sampler(name) for number, name in stages.names().items()}
    samplers["transformers"] = transformers_sampler()
    training = in_turn(trainers, settings.rounds, settings.steps)
    decoding = in_turn(samplers, settings.rounds, settings.tokens)
    for number in stages.names():
        measured = results["stages"][str(number)]
        measured |= losses[number]
        measured["training_tokens_per_second"] = statistics.median(training[number]) * 12 * 64
        measured["training_ratio"] = ratio(training[number], training[0])
        measured["decoding_tokens_per_second"] = statistics.median(decoding[number])
    results["sampling_against_transformers"] = {
        "stage": "stage4_gqa",
        "transformers_tokens_per_second": statistics.median(decoding["transformers"]),
        "ratio": ratio(decoding[4], decoding["transformers"]),
    }
    results["rounds"] = settings.rounds
    runs.write_json(lessons.RESULTS, results)
    print(json.dumps(results, indent=2))


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median ratio of measurements that are neighbours in time."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def in_turn(measured: dict, rounds: int, amount: int) -> dict[object, list[float]]:
    """Calls every function with `amount` once a round, after a warm-up; amounts a second, by round."""
    speeds = {key: [] for key in measured}
    for function in measured.values():
        function(max(2, amount // 4))
    for _ in range(rounds):
        for key, function in measured.items():
            started = time.perf_counter()
            function(amount)
            speeds[key].append(amount / (time.perf_counter() - started))
    return speeds


def finished_runs(folder: Path, name: str) -> dict[int, list[dict]]:
    """The metrics of a stage's finished runs of the laptop preset on TinyShakespeare, by seed."""
    found = {}
    for path in folder.glob("*/config.json"):
        config = runs.read_config(path.parent)
        settings = config["settings"]
        finished = checkpoint.exists(path.parent) and checkpoint.step(path.parent) == settings["steps"]
        kind = (config["stage"], settings["preset"], config["dataset"])
        if finished and kind == (name, "laptop", "tinyshakespeare"):
            found[settings["seed"]] = log.read_metrics(path.parent / "metrics.jsonl")
    if not found:
        raise UserError(f"{folder} has no finished run of {name} on tinyshakespeare, laptop preset")
    return dict(sorted(found.items()))


def final_losses(history: dict[int, list[dict]]) -> dict:
    """Mean and standard deviation, over seeds, of the losses at the end."""
    spread = {"seeds": list(history)}
    for key in ("val_loss", "bits_per_byte"):
        values = [metrics[-1][key] for metrics in history.values()]
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        spread[key] = {"mean": statistics.mean(values), "std": std}
    return spread


def config_of(name: str, **sizes):
    """The laptop preset's sizes for a stage."""
    return stages.load(name).GPTConfig(**{"vocab_size": 65} | presets.PRESETS["laptop"]["model"] | sizes)


def costs(name: str) -> dict:
    """What a stage costs by count."""
    stage, config = stages.load(name), config_of(name)
    model = stage.GPT(config)
    return {
        "parameters": cost.parameters(model),
        "flops_per_token": cost.flops_per_token(model),
        "cache_bytes_per_token": model.new_cache(1, config.block_size).nbytes // config.block_size,
    }


def trainer(name: str, dataset: data.Dataset):
    """A function that trains the stage for n steps, as train.py does."""
    torch.manual_seed(0)
    model = stages.load(name).GPT(config_of(name))
    optimizer = optim.adamw(model, 1e-3, 0.1, (0.9, 0.99))
    autocast = device.autocast(CPU, device.choose_dtype("auto", CPU))

    def steps(n: int) -> None:
        for step in range(n):
            idx, targets = batches.train_batch(dataset.train, 0, step, 12, 64)
            optim.accumulate_gradients(model, idx, targets, 12, autocast)
            optim.update(model, optimizer, 1e-3, 1.0)

    return steps


def sampler(name: str):
    """A function that samples n tokens from the stage with a context of 256."""
    torch.manual_seed(0)
    model = stages.load(name).GPT(config_of(name, block_size=256)).eval()

    def sample(n: int) -> None:
        for _ in sampling.generate(model, [0], n, 65, temperature=0.8, top_k=200):
            pass

    return sample


def transformers_sampler():
    """The same with transformers' generate, on stage 4's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = config_of("stage4_gqa", block_size=256)
    torch.manual_seed(0)
    ours = stages.load("stage4_gqa").GPT(config)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            max_position_embeddings=config.block_size,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            eos_token_id=None,
            bos_token_id=None,
        )
    ).eval()
    theirs.load_state_dict(ours.state_dict())

    def sample(n: int) -> None:
        start = torch.zeros(1, 1, dtype=torch.int64)
        options = {"do_sample": True, "temperature": 0.8, "top_k": 200, "pad_token_id": 0}
        made = theirs.generate(start, attention_mask=start + 1, max_new_tokens=n, min_new_tokens=n, **options)
        assert made.shape[1] == n + 1

    return sample


if __name__ == "__main__":
    cli.run(main)
