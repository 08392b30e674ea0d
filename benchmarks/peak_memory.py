"""Peak memory of loading a run and decoding with it: python -m benchmarks.peak_memory RUN DTYPE

The most that the process had in memory at any time, doing what sample.py does: the weights in the form that
the kernels read, what is needed while they are converted, and the cache. `measure` starts a process of its
own for each run, because a process cannot reset its peak.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

from lab import device, stages
from lab.errors import UserError
from lab.sampling import packed
from lab.storage import runs, tensors

CPU = torch.device("cpu")
PROMPT, TOKENS = 16, 16


def measure(run: Path, dtype: torch.dtype) -> dict[str, int]:
    """{"peak": bytes, "before": bytes}: of the whole process, and before it loaded the weights."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", str(run.resolve())]
    command.append(str(dtype).removeprefix("torch."))
    done = subprocess.run(command, cwd=stages.ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines() or ["no message"]
        raise UserError(f"the peak memory of {run} could not be measured: {lines[-1]}")
    return json.loads(done.stdout)


@torch.inference_mode()
def main(run: str, dtype: str) -> None:
    """Measures in this process, and prints the result as JSON."""
    config = runs.read_config(Path(run))
    with tensors.WithoutMemory():  # the parts of torch that this imports are no memory of the run
        stages.load(config["stage"]).GPT(runs.model_config(Path(run), config))
    before = device.peak_memory(CPU)
    model, _ = runs.load(Path(run), "best", CPU, getattr(torch, dtype))
    packed.pack(model)  # as sample.py
    cache = model.new_cache(1, PROMPT + TOKENS)
    idx = torch.zeros(1, PROMPT, dtype=torch.int64)
    for _ in range(1 + TOKENS):
        model(idx, cache=cache)
        idx = idx[:, :1]
    print(json.dumps({"peak": device.peak_memory(CPU), "before": before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
