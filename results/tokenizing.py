"""Measures tokenizing beside nanoGPT's way, its memory, and what a batch costs: python results/tokenizing.py

Writes the part "tokenizing" of results/results.json. The documents are pieces of TinyShakespeare, as long as
OpenWebText's on average. nanoGPT's way (data/openwebtext/prepare.py there) is written anew here from what it
does: `datasets.map` over as many processes with `encode_ordinary` and the end-of-text token, then all ids
into one memory-mapped file. What it does before, to read parquet files into its cache and to shuffle, is not
counted; ours is counted from the parquet files on, starting the processes included.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
from data import documents, files, sources, tokenizers
from data.shards import Shards
from lab import batches, cli, lessons, presets, runs

DOCUMENT = 4900  # characters, OpenWebText's mean
N_SHARDS, SHARD = 10, 10_000_000  # for the batches: tokens that fit into the memory


@dataclass
class Settings:
    """Measures tokenizing beside nanoGPT's way."""

    rounds: int = 5
    """Times that both are measured, in turn; medians are reported."""
    megabytes: int = 64
    """Text to tokenize."""
    workers: int = os.cpu_count()
    """Processes, of both."""


def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    texts = made_documents(settings.megabytes * 10**6)
    kept = [path.resolve() for path in tokenizers.gpt2_files()]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        os.environ["DATA_DIR"] = str(scratch / "data")
        for path in kept:
            files.write(files.root() / "cache" / path.name, path.read_bytes())
        write_parquet(scratch / "source", texts)
        prepared = from_parquet(scratch / "source", scratch / "cache")
        clocks = {"ours": [], "nanogpt": [], "nanogpt without writing": []}
        for _ in range(settings.rounds):
            seconds, ours = our_way(scratch, settings.workers)
            clocks["ours"].append(seconds)
            encoding, seconds, theirs = nanogpts_way(prepared, scratch, settings.workers)
            clocks["nanogpt"].append(seconds)
            clocks["nanogpt without writing"].append(encoding)
        if ours != theirs:
            raise AssertionError(f"{ours:,} tokens here, {theirs:,} there")
        memory = {n: peak_memory(scratch, texts[: len(texts) // n], settings.workers) for n in (4, 1)}
        batch = batch_milliseconds(scratch)
    speeds = {name: ours / settings.workers / statistics.median(clock) for name, clock in clocks.items()}
    ratios = {name: speeds["ours"] / speeds[name] for name in speeds if name != "ours"}
    measured = {
        "tokens_per_second_and_process": speeds,
        "ratio_to": ratios,
        "tokens": ours,
        "peak_memory_mib": {"a quarter of the text": memory[4], "all of it": memory[1]},
        "batch_milliseconds": batch,
        "workers": settings.workers,
        "rounds": settings.rounds,
        "machine": runs.machine(torch.device("cpu")),
    }
    results = lessons.read_results()
    results["tokenizing"] = measured
    runs.write_json(lessons.RESULTS, results)
    print("tokens/s and process: " + ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items()))
    print("ratio: " + ", ".join(f"{ratio:.2f} to {name}" for name, ratio in ratios.items()))
    print(
        f"peak memory of all processes: {memory[4]:,.0f} MiB for a quarter of the text, {memory[1]:,.0f} MiB"
    )
    print("a batch: " + ", ".join(f"{name} {number:.3f} ms" for name, number in batch.items()))


def made_documents(n_characters: int) -> list[str]:
    """Pieces of TinyShakespeare, from random places."""
    dataset = data.load("tinyshakespeare")
    text = dataset.tokenizer.decode(dataset.train)
    draw = np.random.default_rng(0)
    lengths = draw.integers(100, 2 * DOCUMENT, size=n_characters // DOCUMENT)
    return [text[start : start + n] for n in lengths for start in [draw.integers(len(text) - n)]]


def write_parquet(folder: Path, texts: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(texts)), 4)):
        table = pyarrow.table({"text": [texts[i] for i in part]})
        pyarrow.parquet.write_table(table, folder / f"train-{number}.parquet", row_group_size=1000)


def from_parquet(folder: Path, cache: Path):
    """The documents as a dataset of the library `datasets`, in its own cache."""
    datasets = sources.import_datasets()
    datasets.disable_progress_bars()
    paths = sorted(map(str, folder.iterdir()))
    return datasets.load_dataset("parquet", data_files=paths, split="train", cache_dir=str(cache))


def our_way(scratch: Path, workers: int) -> tuple[float, int]:
    """Seconds, and how many tokens came out."""
    folder = scratch / "ours"
    started = time.perf_counter()
    made = documents.prepare("ours", sources.in_folder(scratch / "source"), folder, 2000, workers)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds, sum(made.meta["tokens"].values())


def nanogpts_way(prepared, scratch: Path, workers: int) -> tuple[float, float, int]:
    """Seconds until all is tokenized, and until it is in the file; how many tokens came out."""
    encoding = data.GPT2Tokenizer()._encoding

    def tokens_of(example: dict) -> dict:
        ids = encoding.encode_ordinary(example["text"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}

    started = time.perf_counter()
    mapped = prepared.map(tokens_of, remove_columns=["text"], num_proc=workers, load_from_cache_file=False)
    encoded = time.perf_counter() - started
    n_tokens = int(np.sum(mapped["len"], dtype=np.int64))
    written = np.memmap(scratch / "theirs.bin", dtype=np.uint16, mode="w+", shape=(n_tokens,))
    parts, at = min(1024, len(mapped)), 0
    for number in range(parts):
        part = mapped.shard(num_shards=parts, index=number, contiguous=True).with_format("numpy")
        ids = np.concatenate(part["ids"])
        written[at : at + len(ids)] = ids
        at += len(ids)
    written.flush()
    seconds = time.perf_counter() - started
    mapped.cleanup_cache_files()
    return encoded, seconds, n_tokens


def peak_memory(scratch: Path, texts: list[str], workers: int) -> float:
    """MiB of `python -m data.openwebtext` and its processes, at most: their proportional shares added up."""
    source = scratch / f"source-{len(texts)}"
    write_parquet(source, texts)
    command = [sys.executable, "-m", "data.openwebtext", "--source", str(source), "--workers", str(workers)]
    root = Path(__file__).parents[1]
    running = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while running.poll() is None:
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        peak = max(peak, sum(memory_of(int(pid)) for pid in [running.pid, *children]))
        time.sleep(0.05)
    if running.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {running.returncode}")
    shutil.rmtree(files.root() / "tokens")
    return peak / 1024


def memory_of(pid: int) -> int:
    """KiB of a process, what it shares with others divided among them; 0 if it has gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def batch_milliseconds(scratch: Path) -> dict[str, float]:
    """By preset: what a batch of one sequence of shards takes, the files being in memory; medians.

    For gpt2 it is a micro-batch of 12 sequences.
    """
    draw = np.random.default_rng(0)
    paths = [scratch / f"train-{number:05d}.bin" for number in range(N_SHARDS)]
    for path in paths:
        draw.integers(50257, size=SHARD, dtype=np.uint16).tofile(path)
    tokens, found = Shards(paths), {}
    for name in ("laptop", "gpt2"):
        preset = presets.PRESETS[name]
        size = preset.get("micro_batch_size", preset["batch_size"])
        clock = []
        for step in range(500):
            started = time.perf_counter()
            batches.train_batch(tokens, 0, step, size, preset["model"]["block_size"])
            clock.append(time.perf_counter() - started)
        found[name] = 1000 * statistics.median(clock)
    return found


if __name__ == "__main__":
    cli.run(main)
