"""Where the time of a training step goes, by kind of operation: python -m benchmarks.step_profile

Runs torch's profiler over training steps of the laptop preset, on the CPU and not compiled. The profiler
itself takes time for every operation, so the milliseconds come from steps without it. Writes the section
"step_profile" of results/results.json; afterwards `python -m lab.pages.lessons` writes the table into
docs/benchmarks.md.
"""

import statistics
import sys
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import moe
from lab import cli, device
from lab.comparison import timing, wanted_runs
from lab.pages import lessons
from lab.storage import runs

CPU = torch.device("cpu")
# Parts of the names of torch's operations. An operation is of the first kind that has a part of its name.
KINDS = {
    "matrix products": "aten::mm aten::addmm aten::bmm aten::_grouped_mm scaled_dot_product",
    "choosing experts and tokens": "topk sort index scatter gather embedding bincount",
    "optimizer": "adamw Optimizer linalg_vector_norm _foreach",
    "copies and conversions": "aten::copy_ aten::_to_copy aten::to aten::cat aten::fill_ aten::zero_",
    "LayerNorm, activations, softmax": "layer_norm gelu silu softmax LogSoftmax sigmoid",
    "element by element, RMSNorm and RoPE": "aten::mul aten::add aten::sub aten::div aten::neg aten::pow "
    "aten::rsqrt aten::sum aten::mean aten::where aten::sin aten::cos",
}
REST = "the rest: views, allocation, autograd"


@dataclass
class Settings:
    """Profiles training steps of the laptop preset."""

    stages: str = "0,4,6,7a,7"
    """Stages to profile."""
    steps: int = 20
    """Profiled steps of each stage."""
    rounds: int = 30
    """Interleaved measurements of a step without the profiler; the medians are reported."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    device.prepare(CPU)
    dtype = device.choose_dtype("auto", CPU)
    steps = {name: moe.training_step(name, dtype) for name in wanted_runs.chosen_stages(settings.stages)}
    seconds = timing.in_turn(steps, settings.rounds, CPU, warm_ups=3)
    measured = {
        name: {
            "milliseconds": 1000 * statistics.median(seconds[name]),
            **profiled(step, settings.steps),
        }
        for name, step in steps.items()
    }
    results = lessons.read_results()
    made = {"rounds": settings.rounds, "dtype": str(dtype)[6:], "machine": runs.machine(CPU)}
    results["step_profile"] = {"stages": measured} | made
    runs.write_json(lessons.RESULTS, results)
    print(lessons.step_profile(results["step_profile"]))


def profiled(step, n_steps: int) -> dict:
    """The number of operations of a step, and the share of the time of each kind of them."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(n_steps):
            step()
    times = dict.fromkeys([*KINDS, REST], 0)
    operations = 0
    for event in recorded.key_averages():
        times[kind_of(event.key)] += event.self_cpu_time_total
        operations += event.count if event.key.startswith("aten::") else 0
    total = sum(times.values())
    return {
        "operations": operations / n_steps,
        "shares": {kind: time / total for kind, time in times.items()},
    }


def kind_of(operation: str) -> str:
    """The kind of an operation of torch's, such as aten::mm."""
    for kind, parts in KINDS.items():
        if any(part in operation for part in parts.split()):
            return kind
    return REST


if __name__ == "__main__":
    cli.run(main)
