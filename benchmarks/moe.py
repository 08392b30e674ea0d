"""Measures stage 6: its experts against other ways to compute them, and what balances them.

python moe.py            writes the part "moe" of results/results.json and the pictures of the lesson,
                                 training what is missing in runs/moe/; then python -m lab.pages.lessons
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
    "no balancing": ["--model.router-aux-loss-coef", "0"],
    "balance loss": [],
    "bias": ["--model.router", "sigmoid"],
}
LESSON = stages.ROOT / "stage6_moe"


@dataclass
class Settings:
    """Measures stage 6."""

    seeds: int = 3
    """Runs of each way to balance."""
    rounds: int = 15
    """Times that each speed is measured, in turn; medians are reported."""
    only_speeds: bool = False
    """Measure the speeds alone, and keep the other figures."""


def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
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
    """Final losses, and how unequal the load was over the last tenth of the run, over seeds."""
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
    """The metrics of a variant's runs of the laptop preset, by seed; trained now where they are missing."""
    histories = []
    for seed in range(n_seeds):
        folder = runs.RUNS / "moe" / f"{name.replace(' ', '-')}-seed{seed}"
        if not flags:  # compare.py trains it
            folder = runs.RUNS / "compare" / "laptop" / f"stage6_moe-tinyshakespeare-seed{seed}"
        if not (folder / "sample.txt").exists():
            command = [sys.executable, "train.py", "--stage", "6", "--preset", "laptop", "--device", "cpu"]
            command += ["--seed", str(seed), "--out", str(folder), *flags]
            subprocess.run(command, cwd=stages.ROOT, check=True, stdout=subprocess.DEVNULL)
        histories.append(log.read_metrics(folder / "metrics.jsonl"))
    return histories


def compare_speeds(rounds: int, dtype: torch.dtype) -> dict:
    """How many times as fast stage 6 is as the others, forward and backward, all in turn."""
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
    """The median over rounds of their time by ours, neighbours in time."""
    seconds = timing.in_turn({"ours": ours, "theirs": theirs}, rounds, CPU, warm_ups=2)
    return timing.median_ratio(seconds["theirs"], seconds["ours"])


def training_step(name: str, dtype: torch.dtype, **fields):
    """A function that does an optimizer step of a stage, laptop preset but for these fields."""
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
    """Forward and backward of stage 6's mixture and of another with the same weights, on 768 tokens.

    width is that of an expert. None: as the stage chooses it beside a shared expert, as in the laptop preset.
    """
    stage = stages.load("stage6_moe")
    sizes = {"n_embd": 128, "n_head": 4, "n_routed_experts": n_experts, "num_experts_per_tok": k}
    width = width or stage.GPTConfig(**sizes).moe_intermediate_size
    made = stage.MoE(stage.GPTConfig(n_shared_experts=0, moe_intermediate_size=width, **sizes)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    made = made.to(dtype)
    x = torch.randn(12, 64, 128, dtype=dtype, requires_grad=True)
    gradient = torch.randn(12, 64, 128, dtype=dtype)
    other = make_other(made)
    with torch.no_grad():
        torch.testing.assert_close(made(x), other(x), atol=0.05, rtol=0.05)

    def stepper(function):
        return lambda: function(x).backward(gradient)

    return stepper(made), stepper(other)


def loop_over_experts(made):
    """The plain way: for each expert, its tokens."""

    def forward(x):
        tokens = x.flatten(0, 1)
        weights, chosen = made.gate(tokens)
        y = torch.zeros_like(tokens)
        for expert in range(len(made.experts.down_proj)):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = F.linear(tokens[token], made.experts.gate_up_proj[expert]).chunk(2, dim=-1)
            answer = F.linear(F.silu(gate) * up, made.experts.down_proj[expert])
            y = y.index_add(0, token, (answer * weights[token, place, None]).to(y.dtype))
        return y.view_as(x)

    return forward


def transformers_mixtral(made):
    """transformers' mixture with our weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = made.gate.config
    config = MixtralConfig(
        hidden_size=sizes.n_embd,
        intermediate_size=sizes.moe_intermediate_size,
        num_local_experts=sizes.n_routed_experts,
        num_experts_per_tok=sizes.num_experts_per_tok,
    )
    theirs = MixtralSparseMoeBlock(config).to(made.gate.weight.dtype).eval()
    theirs.load_state_dict(made.state_dict())
    return theirs


if __name__ == "__main__":
    cli.run(main)
