"""Throughput of the serving engine beside transformers and vLLM: python -m benchmarks.serving

All answer the same requests greedily, in turn, so that noise affects all alike (vLLM in a process of its own,
which waits for its turn). There are three kinds of requests: a mix of lengths, 16 at a time; one request
alone; and prompts that begin with the same 512 tokens. transformers runs twice: generate, with batches padded
to their longest prompt and answer, and its continuous batching. Also measured: which part of the cache's
memory holds no token while the engine answers the mix. Writes the section "serving" of results/results.json,
a picture beside it, and the lesson's tables.
"""

import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.pretrained import export
from deploy.serving import Engine, SamplingParams, memory
from lab import cli, device, stages
from lab.comparison import stage_plots, timing
from lab.errors import UserError
from lab.pages import lessons
from lab.storage import runs

CPU = torch.device("cpu")
PROMPTS, ANSWERS = (8, 32, 64, 128, 256), (4, 16, 32, 64, 128)  # lengths in tokens
SHARED = 512
BLOCK_SIZES = (16, 8)
PICTURE = "serving_memory"

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
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    torch.set_num_threads(settings.threads)
    device.prepare(CPU)
    requests = {
        "mix": mix(settings.requests),
        "alone": [([504, 3575, 282, 4649, 314], 64)],
        "shared": with_shared_prefix(settings.slots),
    }
    with ExitStack() as stack:
        hf = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "hf"
        export(Path(settings.run), "hf", hf)
        engines, calls = {}, {}  # calls by program and kind of requests
        options = {"device": "cpu", "max_batch": settings.slots, "cache_memory": 600.0}
        engine = engines["this engine"] = Engine.of_run(settings.run, dtype="bfloat16", **options)
        if settings.quantized:
            engines["this engine, weights in 4 bits"] = Engine.of_run(settings.quantized, **options)
        for name, each in engines.items():
            calls |= {(name, kind): partial(ours, each, requests[kind]) for kind in requests}
        options = {"max_batch": settings.slots, "cache_memory": 600.0}
        without = Engine(engine.model, engine.tokenizer, prefix_cache=False, **options)
        calls["this engine, no prefix cache", "shared"] = partial(ours, without, requests["shared"])
        if settings.vllm:
            answer = stack.enter_context(vllm(settings, hf))
            calls |= {("vLLM", kind): partial(answer, requests[kind]) for kind in ("mix", "alone")}
        model = load_theirs(hf)
        for kind in ("mix", "alone"):
            call = partial(padded, model, settings.slots, requests[kind])
            calls["transformers, padded batches", kind] = call
        call = partial(continuous, model, settings.slots, requests["mix"])
        calls["transformers, continuous batching", "mix"] = call
        gc.collect()
        seconds = timing.in_turn(calls, settings.rounds, CPU, warm_ups=1)
    programs = {}
    for (name, kind), times in seconds.items():
        n_tokens = sum(n for _, n in requests[kind])
        speeds = [n_tokens / one for one in times]
        programs.setdefault(name, {})[kind] = {"median": statistics.median(speeds), "rounds": speeds}
    used = {}
    for size in BLOCK_SIZES:
        sized = Engine(engine.model, engine.tokenizer, block_size=size, **options)
        used[size] = memory_used(sized, requests["mix"])
    wastes = {f"blocks of {size}": memory.waste(history) for size, history in used.items()}
    wastes["one piece"] = memory.waste(used[BLOCK_SIZES[0]], "contiguous")
    for dark in (False, True):
        with stage_plots.theme(dark):
            path = lessons.RESULTS.parent / f"{PICTURE}{'-dark' if dark else ''}.png"
            memory.draw(used[BLOCK_SIZES[0]], BLOCK_SIZES[0], path)
    results = lessons.read_results()
    results["serving"] = {"tokens_per_second": programs, "waste": wastes, "machine": runs.machine(CPU)}
    results["serving"] |= {"requests": settings.requests, "slots": settings.slots, "rounds": settings.rounds}
    runs.write_json(lessons.RESULTS, results)
    print(lessons.serving(results["serving"]), lessons.serving_waste(wastes), sep="\n\n")
    lesson = stages.ROOT / "deploy" / "serving" / "README.md"
    lesson.write_text(lessons.filled(lesson.read_text(), "serving", results))


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


def ours(engine: Engine, requests: Requests) -> list[list[int]]:
    """The answers of the engine, whose prefix cache is empty at first."""
    engine.forget_prefixes()
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for _, n in requests]
    return [texts[0].token_ids for texts in engine.generate([prompt for prompt, _ in requests], params)]


def memory_used(engine: Engine, requests: Requests) -> list[dict[str, int]]:
    """What the cache's memory is used for after each step (see memory.usage)."""
    for i, (prompt, n) in enumerate(requests):
        engine.add(str(i), prompt, SamplingParams(max_tokens=n, temperature=0, ignore_eos=True))
    history = []
    while engine.has_work():
        engine.step()
        history.append(memory.usage(engine, ANSWERS[-1]))
    return history[:-1]  # after the last step, nothing is held


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
import json, sys
from vllm import LLM, SamplingParams
given = json.loads(sys.stdin.readline())
model = LLM(given["model"], dtype="bfloat16", enforce_eager=True, max_num_seqs=given["slots"],
            max_model_len=2048, enable_prefix_caching=False, skip_tokenizer_init=True)
print("READY", flush=True)
for line in sys.stdin:
    requests = json.loads(line)
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False)
              for prompt, n in requests]
    model.generate([{"prompt_token_ids": prompt} for prompt, n in requests], params, use_tqdm=False)
    print("READY", flush=True)
"""


@contextmanager
def vllm(settings: Settings, folder: Path) -> Iterator[Callable[[Requests], None]]:
    """A function that lets vLLM, in a process of its own, answer requests."""
    threads = ",".join(map(str, range(settings.threads)))
    command = ["env", "VLLM_CPU_KVCACHE_SPACE=1", f"VLLM_CPU_OMP_THREADS_BIND={threads}", settings.vllm]
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen([*command, "-c", VLLM], text=True, **pipes)

        def ask(request) -> None:
            with suppress(BrokenPipeError):  # it has ended, as the loop finds
                print(json.dumps(request), file=process.stdin, flush=True)
            for line in process.stdout:
                if line == "READY\n":
                    return
            errors.seek(0)
            reason = (errors.read().strip().splitlines() or ["it printed nothing"])[-1]
            raise UserError(f"vLLM failed: {reason}\ncheck {settings.vllm}, or leave --vllm out")

        try:
            ask({"model": str(folder), "slots": settings.slots})
            yield ask
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()  # its loop ends, and it stops its own processes
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    cli.run(main)
