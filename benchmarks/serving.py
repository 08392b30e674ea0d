"""Throughput of the serving engine beside transformers and vLLM: python -m benchmarks.serving

All answer the same mix of requests greedily, 16 at a time, in turn, so that noise affects all alike (vLLM
runs last, in a process of its own). transformers runs twice: generate, with batches padded to their longest
prompt and answer, and its continuous batching. Also measured: one request alone, and prompts that begin with
the same 512 tokens, with and without the prefix cache. Prints a table, and writes the section "serving" of
results/results.json.
"""

import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.pretrained import export
from deploy.serving import Engine, SamplingParams
from lab import cli, device
from lab.comparison import markdown, timing
from lab.errors import UserError
from lab.pages import lessons
from lab.storage import runs

CPU = torch.device("cpu")
PROMPTS, ANSWERS = (8, 32, 64, 128, 256), (4, 16, 32, 64, 128)  # lengths in tokens
SHARED = 512

Requests = list[tuple[list[int], int]]
"""Prompts, and how many tokens to generate for each."""


@dataclass
class Settings:
    """Compares the throughput of the serving engine, on the CPU."""

    run: str = "runs/smollm2"
    """Folder of the run, as python -m deploy.pretrained smollm2 makes it."""
    quantized: str | None = None
    """Folder of the same model with quantized weights, to measure too."""
    vllm: str | None = None
    """A Python that has vLLM's CPU build (such as another venv's bin/python), to measure it too."""
    requests: int = 32
    """Requests of the mix."""
    slots: int = 16
    """Texts generated at the same time."""
    rounds: int = 3
    """Interleaved measurements; medians are reported."""
    threads: int = 2
    """Threads of each program."""


def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    torch.set_num_threads(settings.threads)
    device.prepare(CPU)
    requests = mix(settings.requests)
    shared = with_shared_prefix(settings.slots)
    alone = [([504, 3575, 282, 4649, 314], 64)]
    options = {"max_batch": settings.slots, "cache_memory": 600.0}
    engine = Engine.of_run(settings.run, device="cpu", dtype="bfloat16", **options)
    without = Engine.of_run(settings.run, device="cpu", dtype="bfloat16", prefix_cache=False, **options)
    programs: dict[str, tuple[Callable, Requests]] = {
        "ours": (partial(ours, without), requests),
        "ours, one request": (partial(ours, without), alone),
        "ours, shared prefix, no prefix cache": (partial(ours, without), shared),
        "ours, shared prefix": (partial(ours_from_empty, engine), shared),
    }
    if settings.quantized:
        quantized = Engine.of_run(settings.quantized, device="cpu", prefix_cache=False, **options)
        programs["ours, quantized"] = (partial(ours, quantized), requests)
        programs["ours, quantized, one request"] = (partial(ours, quantized), alone)
    with tempfile.TemporaryDirectory() as folder:
        hf = Path(folder) / "hf"
        export(Path(settings.run), "hf", hf)
        model = load_theirs(hf)
        programs["transformers, padded"] = (partial(padded, model, settings.slots), requests)
        programs["transformers, continuous"] = (partial(continuous, model, settings.slots), requests)
        programs["transformers, one request"] = (partial(padded, model, settings.slots), alone)
        seconds = measure(programs, settings)
        if settings.vllm:
            for name, each in (("vLLM", requests), ("vLLM, one request", alone)):
                programs[name] = (None, each)
                seconds[name] = vllm(settings, hf, each)
    waste = engine_waste(without, requests)
    measured = {}
    for name, (_, each) in programs.items():
        tokens = sum(n for _, n in each)
        speeds = [tokens / one for one in seconds[name]]
        measured[name] = {"tokens_per_second": statistics.median(speeds), "rounds": speeds}
    heads = ["", "output tokens/s (lowest to highest)"]
    rows = [
        [name, f"{of['tokens_per_second']:.1f} ({min(of['rounds']):.1f} to {max(of['rounds']):.1f})"]
        for name, of in measured.items()
    ]
    print(markdown.table(heads, rows))
    print(f"\nempty slots in held blocks, mean over the steps: {waste:.1%}")
    results = lessons.read_results()
    results["serving"] = {"programs": measured, "waste": waste, "machine": runs.machine(CPU)}
    results["serving"] |= {"requests": settings.requests, "slots": settings.slots, "rounds": settings.rounds}
    runs.write_json(lessons.RESULTS, results)


def mix(n: int) -> Requests:
    """Random prompts and lengths of answers."""
    draw = random.Random(0)
    return [
        ([draw.randrange(100, 40000) for _ in range(draw.choice(PROMPTS))], draw.choice(ANSWERS))
        for _ in range(n)
    ]


def with_shared_prefix(n: int) -> Requests:
    """n prompts that differ only in their last tokens, as under one system prompt."""
    draw = random.Random(1)
    prefix = [draw.randrange(100, 40000) for _ in range(SHARED)]
    return [(prefix + [draw.randrange(100, 40000) for _ in range(16)], 16) for _ in range(n)]


def measure(programs: dict, settings: Settings) -> dict[str, list[float]]:
    """Seconds of each program in each round, after a round that only warms up."""
    calls = {name: partial(program, requests) for name, (program, requests) in programs.items()}
    gc.collect()
    return timing.in_turn(calls, settings.rounds, CPU, warm_ups=1)


def ours(engine: Engine, requests: Requests) -> list[list[int]]:
    """The answers of the engine."""
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for _, n in requests]
    return [texts[0].token_ids for texts in engine.generate([prompt for prompt, _ in requests], params)]


def ours_from_empty(engine: Engine, requests: Requests) -> list[list[int]]:
    """The answers of the engine, whose prefix cache knows nothing at first."""
    engine.forget_prefixes()
    return ours(engine, requests)


def engine_waste(engine: Engine, requests: Requests) -> float:
    """The share of the slots in held blocks that hold no token, mean over the steps."""
    for i, (prompt, n) in enumerate(requests):
        engine.add(f"waste-{i}", prompt, SamplingParams(max_tokens=n, temperature=0, ignore_eos=True))
    wastes = []
    while engine.has_work():
        engine.step()
        wastes.append(engine.stats()["cache_waste"])
    return statistics.mean(wastes)


def load_theirs(folder: Path):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    return model


@torch.inference_mode()
def padded(model, slots: int, requests: Requests) -> list[list[int]]:
    """The answers of transformers' generate: batches of `slots`, padded to their longest."""
    answers = []
    for start in range(0, len(requests), slots):
        rows = requests[start : start + slots]
        width, n_new = max(len(prompt) for prompt, _ in rows), max(n for _, n in rows)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in rows])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in rows])
        options = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}
        texts = model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
        answers += [text[:n] for text, (_, n) in zip(texts, rows, strict=True)]
    return answers


def continuous(model, slots: int, requests: Requests) -> list[list[int]]:
    """The answers of transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    longest = max(n for _, n in requests)
    config = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(
        num_blocks=128, page_size=64, max_batch_tokens=512, max_requests_per_batch=slots
    )
    manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=batching)
    manager.start()
    for i, (prompt, n) in enumerate(requests):
        manager.add_request(prompt, request_id=str(i), max_new_tokens=n)
    answers = {}
    for result in manager:
        if result.is_finished():
            answers[int(result.request_id)] = result.generated_tokens
        if len(answers) == len(requests):
            break
    manager.stop(block=True)
    return [answers[i] for i in range(len(requests))]


VLLM = """
import json, os, sys, time
given = json.load(sys.stdin)
from vllm import LLM, SamplingParams
model = LLM(given["model"], dtype="bfloat16", enforce_eager=True, max_num_seqs=given["slots"],
            max_model_len=2048, enable_prefix_caching=False, skip_tokenizer_init=True)
prompts = [{"prompt_token_ids": prompt} for prompt, n in given["requests"]]
params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False)
          for prompt, n in given["requests"]]
seconds = []
for _ in range(given["rounds"] + 1):
    started = time.perf_counter()
    model.generate(prompts, params, use_tqdm=False)
    seconds.append(time.perf_counter() - started)
print("SECONDS", json.dumps(seconds[1:]))
"""


def vllm(settings: Settings, folder: Path, requests: Requests) -> list[float]:
    """Seconds of each round of vLLM, in a process of its own after the others."""
    given = {"model": str(folder), "slots": settings.slots, "requests": requests, "rounds": settings.rounds}
    threads = ",".join(map(str, range(settings.threads)))
    command = ["env", "VLLM_CPU_KVCACHE_SPACE=1", f"VLLM_CPU_OMP_THREADS_BIND={threads}", settings.vllm]
    done = subprocess.run([*command, "-c", VLLM], input=json.dumps(given), capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("SECONDS ")]
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(f"vLLM failed: {reason}\ncheck {settings.vllm}, or leave --vllm out")
    return json.loads(found[0].removeprefix("SECONDS "))


if __name__ == "__main__":
    cli.run(main)
