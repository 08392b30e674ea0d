"""Speed of a pretrained model beside transformers and llama.cpp: python -m benchmarks.pretrained

All have the same weights and continue the same prompts greedily, one sequence, in turn, so that noise affects
all alike. A token of decoding reads every weight once, so the bandwidth of the memory bounds its speed: it is
measured in the same rounds, by summing a tensor of as many bytes. Writes the section "pretrained" of
results/results.json; afterwards `python -m lab.pages.lessons` writes the tables into the pages.
"""

import gc
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from data import files
from lab import cli, device, stages
from lab.comparison import markdown, timing
from lab.errors import UserError, shown
from lab.pages import lessons
from lab.sampling import generation, packed
from lab.sampling.compiled import CompiledStep
from lab.storage import runs

CPU = torch.device("cpu")
SHORT = "The capital of France is"
SPAWN = multiprocessing.get_context("spawn")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Settings:
    """Compares the speed of an imported model with transformers and llama.cpp, on the CPU."""

    run: str = "runs/smollm2"
    """Folder of the run, as python -m deploy.pretrained smollm2 makes it."""
    quantized: str | None = None
    """Folder of the same run in 4 bits, as python -m deploy.quantize makes it; measured too."""
    gguf: str | None = None
    """GGUF file of the same model in 4 bits. None: that of deploy.pretrained, if it is in data/cache."""
    rounds: int = 5
    """Number of interleaved measurements; medians are reported."""
    tokens: int = 48
    """Tokens to generate in each measurement."""
    long: int = 500
    """Tokens of the longer prompt."""
    threads: int = 2
    """Threads of each program."""
    compile: bool = True
    """Also measure with --compile, which compiles four times before."""
    print_only: bool = False
    """Write nothing to results.json."""


@dataclass
class Measured:
    """One program's generation after one prompt."""

    prefill: float
    """Seconds until the first token."""
    decoding: float
    """Tokens per second after the first token."""
    tokens: list[int] | None = None


@dataclass
class Program:
    generate: Callable[[list[int]], Measured]
    nbytes: int
    """Bytes of the weights, each of which is read once for a token."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:])
    torch.set_num_threads(settings.threads)
    device.prepare(CPU)
    run = Path(settings.run)
    if settings.compile:
        device.require_compiler(CPU)
    tokenizer = runs.tokenizer(run)
    readme = (stages.ROOT / "README.md").read_text(encoding="utf-8")
    prompts = [tokenizer.encode(SHORT).tolist(), tokenizer.encode(readme).tolist()[: settings.long]]
    with tempfile.TemporaryDirectory() as folder:
        programs = ours(run, settings) | theirs(run, Path(folder), settings)
        programs |= llama_cpp(run, Path(folder), settings)
        tables = []
        for prompt in prompts:
            measured, bandwidths = in_turn(programs, prompt, settings.rounds)
            print(
                f"\n{len(prompt)} tokens of prompt, {settings.tokens} generated, {settings.rounds} rounds:\n"
            )
            rows = [row(name, programs[name].nbytes, measured, bandwidths) for name in programs]
            tables.append({"prompt": len(prompt), "programs": rows})
            print(table(rows))
    machine = runs.machine(CPU)
    print(f"\n{machine['processor']}, {settings.threads} threads, torch {machine['versions']['torch']}")
    if not settings.print_only:
        results = lessons.read_results()
        sizes = {"tokens": settings.tokens, "rounds": settings.rounds, "machine": machine}
        results["pretrained"] = {"prompts": tables, **sizes}
        runs.write_json(lessons.RESULTS, results)


def ours(run: Path, settings: Settings) -> dict[str, Program]:
    """The run, plain and compiled, as sample.py generates with it."""
    programs = {}
    for name, dtype in DTYPES.items():
        model, _ = runs.load(run, "best", CPU, dtype)
        nbytes = sum(parameter.nbytes for parameter in model.parameters())
        packed_model, _ = runs.load(run, "best", CPU, dtype)
        packed.pack(packed_model)
        programs[f"ours {name}"] = Program(
            partial(ours_generates, packed_model, settings.tokens, None), nbytes
        )
        if settings.compile:
            steps = {}  # by the length of the prompt, since the cache is as long as needed
            call = partial(ours_generates, model, settings.tokens, steps)
            programs[f"ours {name} --compile"] = Program(call, nbytes)
    if settings.quantized:
        model, _ = runs.load(Path(settings.quantized), "best", CPU)
        files_of = Path(settings.quantized).glob("last/*.safetensors")
        nbytes = sum(file.stat().st_size for file in files_of)  # packed codes are no parameters of the model
        programs["ours int4"] = Program(partial(ours_generates, model, settings.tokens, None), nbytes)
    return programs


def ours_generates(model, n: int, steps: dict | None, prompt: list[int]) -> Measured:
    """Generates n tokens. steps: the compiled steps so far, by the length of the prompt; None: none."""
    step = None
    if steps is not None:
        if len(prompt) not in steps:
            length = generation.cache_length(model.config.block_size, prompt, n)
            steps[len(prompt)] = CompiledStep(model, -(-length // 256) * 256)  # as in sample.py
        step = steps[len(prompt)]
    vocab_size = model.config.vocab_size
    started = time.perf_counter()
    tokens, times = [], []
    for token in generation.generate(model, prompt, n, vocab_size, temperature=0, step=step):
        tokens.append(token)
        times.append(time.perf_counter())
    return Measured(times[0] - started, (n - 1) / (times[-1] - times[0]), tokens)


def theirs(run: Path, folder: Path, settings: Settings) -> dict[str, Program]:
    """transformers' generate with the exported run."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    export(run, "hf", folder / "hf")
    programs = {}
    for name, dtype in DTYPES.items():
        model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype).eval()
        model.generation_config.eos_token_id = None  # min_new_tokens would give other tokens instead of it
        nbytes = sum(parameter.nbytes for parameter in model.parameters())
        programs[f"transformers {name}"] = Program(partial(theirs_generates, model, settings.tokens), nbytes)
    return programs


class Clock:
    """What generate() calls a streamer: it notes when each token comes."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        self.times.append(time.perf_counter())

    def end(self):
        """Does nothing: the last token has been put."""


@torch.inference_mode()
def theirs_generates(model, n: int, prompt: list[int]) -> Measured:
    """Generates n tokens."""
    idx, clock = torch.tensor([prompt]), Clock()
    options = {"do_sample": False, "max_new_tokens": n, "pad_token_id": 0}
    started = time.perf_counter()
    made = model.generate(idx, attention_mask=torch.ones_like(idx), streamer=clock, **options)
    first, *_, last = clock.times[1:]  # the prompt comes first
    return Measured(first - started, (n - 1) / (last - first), made[0, len(prompt) :].tolist())


def llama_cpp(run: Path, folder: Path, settings: Settings) -> dict[str, Program]:
    """llama.cpp with the exported run in F16, and with the file in 4 bits. stderr says what is left out."""
    if find_spec("xllamacpp") is None:
        print("left out: llama.cpp, because the package xllamacpp is not installed", file=sys.stderr)
        return {}
    paths = {"F16": folder / "f16.gguf"}
    try:
        export(run, "gguf", paths["F16"], "--outtype", "f16")
    except UserError as error:
        print(f"left out: llama.cpp F16, because {error}", file=sys.stderr)
        del paths["F16"]
    small = Path(settings.gguf or files.root() / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    if small.exists():
        paths["Q4_1" if settings.gguf is None else small.stem] = small
    else:
        print(f"left out: llama.cpp in 4 bits, because there is no {shown(small)}", file=sys.stderr)
    programs = {}
    for name, path in paths.items():
        # In a process of its own, because in ours it slows torch down by a quarter, even when it is idle.
        connection, other_end = SPAWN.Pipe()
        context = settings.long + settings.tokens + 8
        serve = (other_end, str(path), context, settings.threads)
        SPAWN.Process(target=serve_llama_cpp, args=serve, daemon=True).start()
        call = partial(llama_cpp_generates, connection, settings.tokens)
        programs[f"llama.cpp {name}"] = Program(call, path.stat().st_size)
    return programs


def serve_llama_cpp(connection, path: str, context: int, threads: int) -> None:
    """Answers requests for completions until the other process ends."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx, parameters.n_parallel = context, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.verbosity = -1
    server = xllamacpp.Server(parameters)
    with suppress(EOFError):
        while True:
            answer = server.handle_completions(connection.recv())
            connection.send(json.loads(answer) if isinstance(answer, str | bytes) else answer)


def llama_cpp_generates(connection, n: int, prompt: list[int]) -> Measured:
    """Generates n tokens; the times are llama.cpp's own."""
    options = {"max_tokens": n, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    connection.send({"prompt": prompt} | options)
    timings = connection.recv()["timings"]
    if timings["prompt_n"] < len(prompt) or timings["predicted_n"] < n:
        raise UserError(f"llama.cpp did not compute all tokens: {timings}")
    return Measured(timings["prompt_ms"] / 1000, timings["predicted_per_second"])


def export(run: Path, to: str, out: Path, *flags: str) -> None:
    """Calls deploy.export. Raises UserError with its last line if it fails."""
    command = [
        sys.executable,
        "-m",
        "deploy.export",
        "--run",
        run.resolve(),
        "--to",
        to,
        "--out",
        out,
        *flags,
    ]
    done = subprocess.run(command, cwd=stages.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the export to {to} failed: {(done.stderr.splitlines() or ['no message'])[-1]}")


def in_turn(programs: dict[str, Program], prompt: list[int], rounds: int) -> tuple[dict, dict]:
    """The measurements of each program in each round, and the bandwidth (bytes/s) for its number of bytes.

    The round before them does not count: it compiles, and fills caches.
    """
    measured = {name: [] for name in programs}
    bandwidths = {program.nbytes: [] for program in programs.values()}
    for _ in range(1 + rounds):
        for name, program in programs.items():
            measured[name].append(program.generate(prompt))
        for nbytes in bandwidths:
            bandwidths[nbytes].append(bandwidth(nbytes))
    return {name: of[1:] for name, of in measured.items()}, {n: of[1:] for n, of in bandwidths.items()}


def bandwidth(nbytes: int) -> float:
    """Bytes per second of reading so many bytes, the best of several times."""
    values = torch.ones(nbytes // 8, dtype=torch.int64)  # integers are added in any order: fast
    seconds = min(timing.seconds_of(values.sum, 5, CPU))
    del values
    gc.collect()
    return nbytes / seconds


def row(name: str, nbytes: int, measured: dict[str, list[Measured]], bandwidths: dict) -> dict:
    """A program's figures: medians over the rounds; ratios are medians of the ratios within a round."""
    speeds = [one.decoding for one in measured[name]]
    figures = {
        "program": name,
        "prefill_seconds": statistics.median(one.prefill for one in measured[name]),
        "tokens_per_second": statistics.median(speeds),
        "speeds": speeds,
        "bytes": nbytes,
        "bandwidth": statistics.median(bandwidths[nbytes]),
        "share": timing.median_ratio([nbytes * speed for speed in speeds], bandwidths[nbytes]),
    }
    if name.startswith("ours"):
        dtype = "fp32" if "fp32" in name else "bf16"
        baseline = [one.decoding for one in measured[f"transformers {dtype}"]]
        figures["of_transformers"] = timing.median_ratio(speeds, baseline)
    tokens, reference = measured[name][0].tokens, measured["transformers fp32"][0].tokens
    if tokens:
        figures["same_tokens"] = sum(a == b for a, b in zip(tokens, reference, strict=True)) / len(tokens)
    return figures


def table(rows: list[dict]) -> str:
    """All figures of one prompt, in Markdown."""
    made = []
    for one in rows:
        speeds = f"{one['tokens_per_second']:.1f} ({min(one['speeds']):.1f} to {max(one['speeds']):.1f})"
        made.append(
            [
                one["program"],
                f"{one['prefill_seconds']:.2f}",
                speeds,
                f"{one['of_transformers']:.2f}" if "of_transformers" in one else None,
                f"{one['bytes'] / 1e6:.0f}",
                f"{one['bandwidth'] / 1e9:.1f}",
                f"{one['share']:.0%}",
                f"{one['same_tokens']:.0%}" if "same_tokens" in one else None,
            ]
        )
    heads = ["program", "prefill (s)", "tokens/s", "× transformers", "weights (MB)", "memory (GB/s)"]
    return markdown.table([*heads, "of the memory's speed", "tokens as transformers fp32"], made)


if __name__ == "__main__":
    cli.run(main)
