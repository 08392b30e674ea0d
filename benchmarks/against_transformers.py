"""Compares our sampling with transformers' generate: python -m benchmarks.against_transformers

Both use the same laptop-sized model, converted by deploy/, and sample one sequence greedily, interleaved.
Writes the section "against_transformers" of results/results.json; afterwards run python -m lab.pages.lessons.
"""

import json
import statistics
import sys
from dataclasses import asdict, dataclass

import torch

from deploy import deepseek, gpt2, llama, mixtral
from lab import cli, device, stages
from lab.comparison import timing
from lab.pages import lessons
from lab.sampling import generation
from lab.sampling.compiled import CompiledStep
from lab.storage import checkpoint, runs
from lab.training import presets

CPU = torch.device("cpu")
COUNTERPARTS = {"stage0_gpt": gpt2, "stage4_gqa": llama, "stage6_moe": mixtral, "stage7_mla_mtp": deepseek}


@dataclass
class Settings:
    """Compares the speed of sampling with transformers."""

    rounds: int = 7
    """Number of interleaved measurements; medians are reported."""
    tokens: int = 200
    """Tokens to sample in each measurement, with a context of 256."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    device.prepare(CPU)
    measured = {name: compare(name, settings) for name in COUNTERPARTS}
    results = lessons.read_results()
    results["against_transformers"] = {
        "stages": measured,
        "context": 256,
        "rounds": settings.rounds,
        "machine": runs.machine(CPU),
    }
    runs.write_json(lessons.RESULTS, results)
    print(json.dumps(results["against_transformers"], indent=2))


def compare(name: str, settings: Settings) -> dict:
    """Tokens per second of both, and the median ratio of consecutive measurements."""
    ours, theirs = make_both(name)
    step = CompiledStep(ours)
    sample = {
        "ours": lambda: ours_samples(ours, settings.tokens),
        "compiled": lambda: ours_samples(ours, settings.tokens, step),
        "theirs": lambda: theirs_samples(theirs, settings.tokens),
    }
    texts = {key: function() for key, function in sample.items()}  # also the warm-up
    same = sum(a == b for a, b in zip(texts["ours"], texts["theirs"], strict=True)) / settings.tokens
    seconds = timing.in_turn(sample, settings.rounds, CPU)
    speeds = {key: [settings.tokens / one for one in times] for key, times in seconds.items()}
    measured = {f"{key}_tokens_per_second": statistics.median(values) for key, values in speeds.items()}
    for key, prefix in (("ours", ""), ("compiled", "compiled_")):
        ratios = [a / b for a, b in zip(speeds[key], speeds["theirs"], strict=True)]
        measured |= {f"{prefix}ratio": statistics.median(ratios), f"{prefix}ratios": ratios}
    return measured | {"same_tokens": same, "compile_seconds": step.seconds}


def make_both(name: str):
    """Our laptop-sized model with a context of 256 and random weights, and transformers' with the same."""
    from transformers import AutoConfig, AutoModelForCausalLM

    stage = stages.load(name)
    sizes = presets.PRESETS["laptop"]["model"] | {"block_size": 256}
    if name == "stage6_moe":
        sizes |= {"router": "softmax", "n_shared_experts": 0}  # a Mixtral
    torch.manual_seed(0)
    ours = stage.GPT(stage.GPTConfig(vocab_size=65, **sizes)).eval()
    counterpart, sizes = COUNTERPARTS[name], asdict(ours.config)
    config = counterpart.to_config(sizes)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    tensors = counterpart.to_tensors(checkpoint.weights(ours), sizes)
    in_memory = theirs.state_dict()
    stacked = {key: value for key, value in checkpoint.weights(ours).items() if "mlp.experts." in key}
    theirs.load_state_dict({k: v for k, v in (tensors | stacked).items() if k in in_memory}, strict=False)
    theirs.tie_weights()
    return ours, theirs


def ours_samples(model, n: int, step: CompiledStep | None = None) -> list[int]:
    """Samples n tokens greedily with our model."""
    return list(generation.generate(model, [0, 1, 2], n, 65, temperature=0, step=step))


@torch.inference_mode()
def theirs_samples(model, n: int) -> list[int]:
    """Samples n tokens greedily with transformers' generate."""
    start = torch.tensor([[0, 1, 2]])
    options = {"do_sample": False, "max_new_tokens": n, "min_new_tokens": n, "pad_token_id": 0}
    return model.generate(start, attention_mask=torch.ones_like(start), **options)[0, 3:].tolist()


if __name__ == "__main__":
    cli.run(main)
