"""The sections of gpu_check.py, which runs this file once per section.

After a CUDA error a process can no longer use the device, so each section runs in its own process. It appends
a line of JSON to a file for every start of a part, figure and failure, so a killed section keeps its results.
The machine, the tests and compiling are here, the other sections in gpu_training.py and gpu_layers.py.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import traceback

import torch

from benchmarks.gpu_layers import attention, attention_ways, decoder, decoding, mixture
from benchmarks.gpu_run import BROKEN, DECODING_STAGES, FULL, Run, first_line, is_broken, seconds_of
from benchmarks.gpu_serving import serving
from benchmarks.gpu_training import Trainer, compiled, eager, float32, nanogpt, training
from lab import device, stages
from lab.sampling.compiled import CompiledStep
from lab.storage import runs

# 0: the machine


def machine(run: Run) -> None:
    """Identifies the machine, and measures its speed of matrix products and of copying, for reference."""
    figures = runs.machine(run.device)
    names = ("triton", "flash-attn", "transformers", "pytest", "matplotlib")
    figures["versions"] |= {name: runs.installed(name) for name in names}
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        figures |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            figures["driver"] = subprocess.run(smi, capture_output=True, text=True, timeout=20).stdout.strip()
    figures["dtype"] = str(run.dtype).removeprefix("torch.")
    figures["peak_flops"] = device.peak_flops(run.device)
    run.record("machine", **figures)
    with run.attempt("matrix product"):
        a, b = torch.randn(2, run.sizes.product, run.sizes.product, device=run.device, dtype=run.dtype)
        seconds_of(lambda: a @ b, 3, run.device)
        median = statistics.median(seconds_of(lambda: a @ b, 10, run.device))
        run.record("matrix product", rows=run.sizes.product, flops_per_second=2 * len(a) ** 3 / median)
    with run.attempt("copy"):
        free = torch.cuda.mem_get_info()[0] if run.device.type == "cuda" else 2**30
        source = torch.ones(min(run.sizes.copied, free // 4), dtype=torch.uint8, device=run.device)
        target = torch.empty_like(source)
        seconds_of(lambda: target.copy_(source), 3, run.device)
        median = statistics.median(seconds_of(lambda: target.copy_(source), 10, run.device))
        run.record("copy", bytes=len(source), bytes_per_second=2 * len(source) / median)


# 1: the tests


def tests(run: Run) -> None:
    """Runs the tests marked gpu; each test is a part. If n processes share them, each runs every n-th."""
    try:
        import pytest
    except ImportError:
        run.skip("tests", "pytest is not installed")
        return
    number, n_shards = run.shard

    class Recorder:
        def pytest_collection_modifyitems(self, items):
            items[:] = [
                item
                for place, item in enumerate(items)
                if place % n_shards == number and item.nodeid not in run.done
            ]

        def pytest_runtest_logstart(self, nodeid):
            self.seconds = 0.0
            run.note("started", nodeid)

        def pytest_runtest_logreport(self, report):
            self.seconds += report.duration
            if report.failed:
                run.note(
                    "failed",
                    report.nodeid,
                    error=f"{report.when}: {str(report.longrepr).strip().splitlines()[-1]}",
                    traceback=str(report.longrepr)[-6000:],
                )
            elif report.skipped:
                run.skip(report.nodeid, str(report.longrepr[-1] if report.longrepr else ""))
            if report.when == "teardown":
                run.record(report.nodeid, seconds=round(self.seconds, 2))

        def pytest_runtest_logfinish(self, nodeid):
            run.note("ended", nodeid)
            if is_broken(run.device):
                os._exit(BROKEN)

    files = ["test_gpu", "test_flash", "test_parallel", "test_serving_engine", "test_serving_drafts"]
    if run.smoke:  # where every test is skipped, and importing the others would take the most time
        files = files[:2]
    status = pytest.main(
        ["-q", "-m", "gpu", "-p", "no:cacheprovider", *(f"tests/{name}.py" for name in files)],
        plugins=[Recorder()],
    )
    if status in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERRUPTED):
        raise RuntimeError(f"pytest exited with status {int(status)}; see its output")


# Compiling, which runs beside the tests so that later sections do not wait for it


def warm_up(run: Run) -> None:
    """Compiles what a later section needs into the caches on disk; a part's name says what."""
    import torch._inductor.config

    # Autotuning is not reliable while other processes use the device, so do not keep its results.
    torch._inductor.config.autotune_local_cache = False
    for part in run.parts(run.shard):
        with run.attempt(part):
            what, _, name = part.partition(": ")
            if what == "training":
                device.prepare(run.device)
                trainer = Trainer(run, name, run.device, run.dtype, compiled=True)
                trainer.must_learn()
            elif what == "decoding":
                device.prepare(run.device)
                stage, _, batch_size = name.partition(" ")
                CompiledStep(decoder(run, stage, int(batch_size)))
            elif what == "attention":
                sizes = run.sizes.attention
                triton = attention_ways(run, sizes, int(name))["triton"]
                if callable(triton):
                    q = torch.randn(1, sizes["n_head"], int(name), sizes["head_dim"], device=run.device)
                    q = q.to(run.dtype).requires_grad_()
                    kv = q.detach()[:, : sizes["n_kv_head"]].clone().requires_grad_()
                    torch.autograd.grad(triton(q, kv, kv), (q, kv), torch.randn_like(q))


def warm_ups(smoke: bool) -> list[list[str]]:
    """The parts of warm_up for each process, in the order in which they are needed."""
    if smoke:
        return [["training: stage0_gpt", "attention: 16", "decoding: stage4_gqa 1"]]
    parts = [f"training: {name}" for name in stages.course()]
    parts += [f"attention: {context}" for context in FULL.attention["contexts"]]
    parts += [f"decoding: {name} {batch}" for batch in FULL.batch_sizes for name in DECODING_STAGES]
    return [[part] for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("section", "figures", "scratch"):
        parser.add_argument(name)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--done", default="[]")
    parser.add_argument("--shard", type=json.loads, default=None)
    parser.add_argument("--nanogpt")
    parser.add_argument("--smoke", action="store_true")
    run = Run(parser.parse_args())
    sections = (
        machine,
        tests,
        eager,
        compiled,
        float32,
        attention,
        mixture,
        decoding,
        serving,
        training,
        nanogpt,
        warm_up,
    )
    chosen = {section.__name__: section for section in sections}[sys.argv[1]]
    try:
        chosen(run)
    except Exception as error:
        run.note("failed", "", error=first_line(error), traceback=traceback.format_exc())


if __name__ == "__main__":
    main()
