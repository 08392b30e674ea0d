"""Measures stage 6: the speed of its experts against other implementations, and ways to balance them.

python -m benchmarks.moe trains the missing runs in runs/moe/, and writes the section "moe" of
results/results.json and the lesson's figures; afterwards run python -m lab.pages.lessons.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lab import cli, device, stages
from lab.comparison import spread, timing
from lab.pages import lessons
from lab.storage import runs
from lab.training import log, optim, presets, run_plots

CPU = torch.device("cpu")
VARIANTS = {
    "softmax, no balancing": ["--model.router", "softmax", "--model.router-aux-loss-coef", "0"],
    "softmax, balance loss": ["--model.router", "softmax"],
    "sigmoid, bias": [],
}
LESSON = stages.ROOT / "stage6_moe"


@dataclass
class Settings:
    """Measures stage 6."""

    seeds: int = 3
    """Number of runs of each way to balance."""
    rounds: int = 15
    """Number of interleaved measurements of each speed; medians are reported."""
    only_speeds: bool = False
    """Only measure the speeds, and keep the other figures."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    device.prepare(CPU)
    speeds = {
        dtype: compare_speeds(settings.rounds, getattr(torch, dtype)) for dtype in ("float32", "bfloat16")
    }
    if settings.only_speeds:
        results = lessons.read_results()
        results["moe"] |= {"speeds": speeds, "rounds": settings.rounds, "machine": runs.machine(CPU)}
        runs.write_json(lessons.RESULTS, results)
        print(json.dumps(speeds, indent=2))
        return
    balanced = {name: train(name, flags, settings.seeds) for name, flags in VARIANTS.items()}
    run_plots.balancing({name: seeds[0] for name, seeds in balanced.items()}, LESSON / "load.png")
    results = lessons.read_results()
    results["moe"] = {
        "speeds": speeds,
        "balancing": {name: summary(seeds) for name, seeds in balanced.items()},
        "rounds": settings.rounds,
        "machine": runs.machine(CPU),
    }
    runs.write_json(lessons.RESULTS, results)
    print(json.dumps(results["moe"], indent=2))


def summary(seeds: list[list[dict]]) -> dict:
    """Final losses, and how unevenly the load was spread over the last tenth of the run, over the seeds."""
    losses = [metrics[-1]["val_loss"] for metrics in seeds]
    busiest = [statistics.mean(r["busiest_expert"] for r in m[-len(m) // 10 :]) for m in seeds]
    entropy = [statistics.mean(m[-1]["router_entropy"]) for m in seeds]
    return {
        "val_loss": spread.summary(losses),
        "busiest_expert": statistics.mean(busiest),
        "router_entropy": statistics.mean(entropy),
        "seeds": len(seeds),
    }


def train(name: str, flags: list[str], n_seeds: int) -> list[list[dict]]:
    """The metrics of a variant's runs of the laptop preset, by seed. Trains the missing runs."""
    histories = []
    for seed in range(n_seeds):
        folder = runs.RUNS / "moe" / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
        if not flags:  # the default, which compare.py trains
            folder = runs.RUNS / "compare" / "laptop" / f"stage6_moe-tinyshakespeare-seed{seed}"
        if not (folder / "sample.txt").exists():
            command = [sys.executable, "train.py", "--stage", "6", "--preset", "laptop", "--device", "cpu"]
            command += ["--seed", str(seed), "--out", str(folder), *flags]
            subprocess.run(command, cwd=stages.ROOT, check=True, stdout=subprocess.DEVNULL)
        histories.append(log.read_metrics(folder / "metrics.jsonl"))
    return histories


def compare_speeds(rounds: int, dtype: torch.dtype) -> dict:
    """Stage 6's speed relative to other implementations, forward and backward, interleaved."""
    return {
        "of_stage_5": ratio(rounds, training_step("stage6_moe", dtype), training_step("stage5_flash", dtype)),
        "of_a_loop_over_64_experts": ratio(rounds, *mixtures(dtype, 64, 6, loop_over_experts)),
        "of_transformers_mixtral": ratio(rounds, *mixtures(dtype, 8, 2, transformers_mixtral)),
        "of_transformers_mixtral_with_experts_of_344": ratio(
            rounds, *mixtures(dtype, 8, 2, transformers_mixtral, 344)
        ),
        "of_transformers_mixtral_64_experts": ratio(rounds, *mixtures(dtype, 64, 6, transformers_mixtral)),
    }


def ratio(rounds: int, ours, theirs) -> float:
    """The median ratio of their time to ours, from consecutive measurements."""
    seconds = timing.in_turn({"ours": ours, "theirs": theirs}, rounds, CPU, warm_ups=2)
    return timing.median_ratio(seconds["theirs"], seconds["ours"])


def training_step(name: str, dtype: torch.dtype, **fields):
    """A function that runs a training step of a stage on the laptop preset, with these fields changed."""
    stage = stages.load(name)
    model = stage.GPT(stage.GPTConfig(vocab_size=65, **presets.PRESETS["laptop"]["model"], **fields))
    optimizer, autocast = optim.adamw(model, 1e-3, 0.1, (0.9, 0.99)), device.autocast(CPU, dtype)
    idx = torch.randint(65, (12, 64))

    def step():
        optim.accumulate_gradients(model, idx, idx, 12, autocast)
        optim.update(model, optimizer, 1e-3, 1.0)
        if hasattr(model, "after_step"):
            model.after_step()

    return step


def mixtures(dtype: torch.dtype, n_experts: int, k: int, make_other, width: int | None = None):
    """Functions that run stage 6's mixture, and another one with the same weights, forward and backward.

    Both get 768 tokens. width: the width of an expert. None: the stage's default with a shared expert, as in
    the laptop preset.
    """
    stage = stages.load("stage6_moe")
    sizes = {"n_embd": 128, "n_head": 4, "n_routed_experts": n_experts, "num_experts_per_tok": k}
    width = width or stage.GPTConfig(**sizes).moe_intermediate_size
    sizes |= {"n_shared_experts": 0, "router": "softmax"}  # as in Mixtral
    moe = stage.MoE(stage.GPTConfig(moe_intermediate_size=width, **sizes)).eval()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    moe = moe.to(dtype)
    x = torch.randn(12, 64, 128, dtype=dtype, requires_grad=True)
    gradient = torch.randn(12, 64, 128, dtype=dtype)
    other = make_other(moe)
    with torch.no_grad():
        torch.testing.assert_close(moe(x), other(x), atol=0.05, rtol=0.05)

    def stepper(function):
        return lambda: function(x).backward(gradient)

    return stepper(moe), stepper(other)


def loop_over_experts(moe):
    """The naive implementation: a loop over the experts, each with its tokens."""

    def forward(x):
        tokens = x.flatten(0, 1)
        weights, indices = moe.gate(tokens)
        y = torch.zeros_like(tokens)
        for expert in range(len(moe.experts.down_proj)):
            token, place = (indices == expert).nonzero(as_tuple=True)
            gate, up = F.linear(tokens[token], moe.experts.gate_up_proj[expert]).chunk(2, dim=-1)
            output = F.linear(F.silu(gate) * up, moe.experts.down_proj[expert])
            y = y.index_add(0, token, (output * weights[token, place, None]).to(y.dtype))
        return y.view_as(x)

    return forward


def transformers_mixtral(moe):
    """transformers' Mixtral layer with our weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = moe.gate.config
    config = MixtralConfig(
        hidden_size=sizes.n_embd,
        intermediate_size=sizes.moe_intermediate_size,
        num_local_experts=sizes.n_routed_experts,
        num_experts_per_tok=sizes.num_experts_per_tok,
    )
    theirs = MixtralSparseMoeBlock(config).to(moe.gate.weight.dtype).eval()
    theirs.load_state_dict(moe.state_dict())
    return theirs


if __name__ == "__main__":
    cli.run(main)
