"""Shows where shared key/value heads pay: decoding many texts at a time, with long contexts.

python -m benchmarks.ideas.shared_heads measures a model of SmolLM2-135M's sizes with 9, 3 and 1 key/value
heads and random weights, in bfloat16: tokens/s, which part of the step's time is needed to read the weights
and the cache from memory once, and how many texts fit into 2 GiB. The code is stage 5's: for a single new
token, it makes the queries that share a head rows of one product, so that the head is read once for all of
them. Beside it: the attention of one layer alone, in two precisions, and the validation loss of the laptop
preset with 4, 2 and 1 heads. Writes results/ideas/shared_heads*.json and a picture; afterwards run
python -m lab.pages.lessons.

Everything runs in one thread, and its processor time counts: other programs hardly change it.
"""

import functools
import math
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks import ideas
from lab import cli, device, stages
from lab.comparison import report, spread, timing
from lab.sampling import packed
from lab.training import presets, run_plots

SMOLLM2 = {"vocab_size": 49152, "n_layer": 30, "n_head": 9, "n_embd": 576, "intermediate_size": 1536}
HEADS = (9, 3, 1)
HEADS_TRAINED = (4, 2, 1)  # the laptop preset has 4 query heads
LAYER = (8, 4096)  # batch size and context of the attention that is measured alone
ROOM = 2 * 2**30  # bytes: how many texts fit


@dataclass
class Settings:
    """Measures decoding with 9, 3 and 1 key/value heads, and trains the laptop preset with 4, 2 and 1."""

    rounds: int = 7
    """Number of interleaved measurements of each speed; medians are reported."""
    batch_sizes: tuple[int, ...] = (1, 8, 32, 64)
    """Numbers of texts that are decoded at a time."""
    contexts: tuple[int, ...] = (256, 1024, 4096)
    """Numbers of tokens in the cache of each text."""
    largest_cache: float = 4.5
    """GiB: a batch whose cache is larger is left out."""
    seeds: int = 3
    """Number of training runs for each number of heads; 0: measure only the speeds."""


def main():
    settings = cli.parse_benchmark_flags(Settings, sys.argv[1:], may_be_0=("seeds",))
    print("about 3 minutes; another 20 if the nine runs must be trained first", flush=True)
    device.prepare(ideas.CPU)
    torch.set_num_threads(1)
    write_layers(one_layer(settings.rounds), settings)
    write_speeds(decoding(settings), settings)
    if settings.seeds:
        write_losses({n: trained_losses(n, settings.seeds) for n in HEADS_TRAINED})


def trained_losses(n_kv_head: int, seeds: int) -> list[float]:
    """Final validation losses of the laptop preset with this many key/value heads, by seed."""
    losses = []
    for seed in range(seeds):
        flags = ["--stage", "4", "--model.n-kv-head", str(n_kv_head), "--seed", str(seed)]
        _, metrics = ideas.trained(f"kv-heads-{n_kv_head}-seed{seed}", flags)
        losses.append(metrics[-1]["val_loss"])
    return losses


def decoding(settings: Settings) -> dict:
    """The time of a decoding step by batch size, context and key/value heads, interleaved.

    Each round measures everything once, also with a single token in the cache: all that is not its reading.
    """
    models, weights = {}, {}
    for n in HEADS:
        models[n] = smollm2(n)
        weights[n] = sum(parameter.nbytes for parameter in models[n].parameters())
        packed.pack(models[n])  # as sample.py
    rows, left_out = {}, []
    for batch_size in settings.batch_sizes:
        for context in (1, *settings.contexts):
            for n, model in models.items():
                row = {"batch_size": batch_size, "context": context, "n_kv_head": n}
                row["cache_bytes"] = batch_size * context * bytes_per_token(model.config, 2)
                if row["cache_bytes"] > settings.largest_cache * 2**30:
                    left_out.append(row)
                else:
                    rows[batch_size, context, n] = row
    largest = max(row["cache_bytes"] for row in rows.values())
    memory = torch.randn(2**20).bfloat16().repeat(math.ceil(largest / 2**21))  # of all caches, one at a time
    calls = {
        (b, context, n): functools.partial(step, models[n], memory, b, context) for b, context, n in rows
    }
    numbers = torch.ones(2**26)  # many times as large as the processor's cache
    seconds = timing.in_turn(calls | {"read": numbers.amax}, settings.rounds, ideas.CPU, 1, time.process_time)
    bandwidth = numbers.nbytes / min(seconds["read"])
    for key, row in rows.items():
        row["seconds"] = statistics.median(seconds[key])
        row["tokens_per_second"] = row["batch_size"] / row["seconds"]
        row["weight_bytes"] = weights[row["n_kv_head"]]
        row["memory_bound"] = (row["weight_bytes"] + row["cache_bytes"]) / bandwidth  # seconds
    return {"bytes_read_per_second": bandwidth, "decoding": list(rows.values()), "left_out": left_out}


def smollm2(n_kv_head: int) -> torch.nn.Module:
    """A model of SmolLM2-135M's sizes with this many key/value heads and random weights, in bfloat16."""
    stage = stages.load("stage5_flash")
    return stage.GPT(stage.GPTConfig(n_kv_head=n_kv_head, **SMOLLM2)).bfloat16().eval()


def bytes_per_token(config, bytes_per_number: int) -> int:
    """What a token takes in the cache."""
    return 2 * config.n_layer * config.n_kv_head * config.n_embd // config.n_head * bytes_per_number


@torch.inference_mode()
def step(model: torch.nn.Module, memory: torch.Tensor, batch_size: int, context: int) -> torch.Tensor:
    """Decodes one token for each text, the last of `context` in the cache. Returns the logits.

    The cache lies in `memory`, which holds random numbers: all caches together would need too much.
    """
    cache = model.new_cache(batch_size, 0)
    shape = (*cache.keys.shape[:3], context, cache.keys.size(4))
    cache.keys, cache.values = memory[: 2 * math.prod(shape)].view(2, *shape)
    cache.max_length, cache.length = context, context - 1
    logits, _ = model(torch.zeros(batch_size, 1, dtype=torch.int64), cache=cache)
    return logits


@torch.inference_mode()
def one_layer(rounds: int) -> dict:
    """The time of one layer's attention for a new token, by precision and key/value heads, interleaved."""
    attention = stages.load("stage5_flash").attention
    batch_size, context = LAYER
    n_head, calls, sizes = SMOLLM2["n_head"], {}, {}
    width = SMOLLM2["n_embd"] // n_head
    for dtype in ("bfloat16", "float32"):
        for n in HEADS:
            q = torch.randn(batch_size, n_head, 1, width).to(getattr(torch, dtype))
            k, v = torch.randn(2, batch_size, n, context, width).to(q.dtype)
            calls[dtype, n] = functools.partial(attention, q, k, v, None, 0.0)
            sizes[dtype, n] = k.nbytes + v.nbytes
    return {
        dtype: {n: {"seconds": statistics.median(taken[dtype, n]), "bytes": sizes[dtype, n]} for n in HEADS}
        for taken in [timing.in_turn(calls, rounds, ideas.CPU, 1, time.process_time)]
        for dtype in ("bfloat16", "float32")
    }


def write_speeds(measured: dict, settings: Settings) -> None:
    """Writes the speeds of decoding, their table and picture."""
    speeds = {(row["context"], row["batch_size"], row["n_kv_head"]): row for row in measured["decoding"]}

    def cell(*key) -> str:
        if key not in speeds:
            return "does not fit"
        row = speeds[key]
        return f"{row['tokens_per_second']:,.1f} ({row['memory_bound'] / row['seconds']:.0%})"

    rows = [
        [f"{context:,}", batch, *(cell(context, batch, n) for n in HEADS)]
        for context in settings.contexts
        for batch in settings.batch_sizes
    ]

    def draw():
        figure, panels = run_plots.new_figure(12, 4, columns=len(settings.contexts))
        panels = np.atleast_1d(panels)
        for panel, context in zip(panels, settings.contexts, strict=True):
            panel.sharey(panels[0])
            for n, color, marker in zip(HEADS, run_plots.RUN_COLORS, "osD", strict=False):
                batches = [batch for batch in settings.batch_sizes if (context, batch, n) in speeds]
                tokens = [speeds[context, batch, n]["tokens_per_second"] for batch in batches]
                panel.plot(batches, tokens, color=color, marker=marker, label=key_value_heads(n))
            panel.set_title(f"context {context:,}", fontsize=10)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.set_xticks(settings.batch_sizes, [str(batch) for batch in settings.batch_sizes])
            panel.yaxis.set_major_formatter("{x:g}")
            panel.set_xlabel("texts at a time")
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("tokens/s, all texts together")
        panels[0].legend(fontsize=9)
        return figure

    heads = ["context", "texts at a time", *map(key_value_heads, HEADS)]
    alt = (
        "Tokens per second against the number of texts decoded at a time, one panel for each context, one "
        "line for each number of key/value heads: 9, 3 and 1."
    )
    ideas.write("shared_heads", {"rounds": settings.rounds} | measured, heads, rows, draw, alt)


def write_layers(measured: dict, settings: Settings) -> None:
    """Writes what the cache takes, and the times of one layer's attention."""
    stage, rows = stages.load("stage5_flash"), []
    for n in HEADS:
        size = bytes_per_token(stage.GPTConfig(n_kv_head=n, **SMOLLM2), 2)
        row = [n, f"{size:,}", *(f"{ROOM // (context * size):,}" for context in settings.contexts)]
        for by_heads in measured.values():
            of = by_heads[n]
            row.append(f"{1000 * of['seconds']:.1f} ({of['bytes'] / of['seconds'] / 1e9:.1f} GB/s)")
        rows.append(row)
    heads = ["key/value heads", "bytes a token"]
    heads += [f"texts of {context:,} tokens in 2 GiB" for context in settings.contexts]
    heads += [f"ms of one layer's attention, {dtype}" for dtype in measured]
    sizes = {"batch_size": LAYER[0], "context": LAYER[1], "rounds": settings.rounds}
    ideas.write("shared_heads_layer", sizes | {"attention": measured}, heads, rows)


def write_losses(losses: dict[int, list[float]]) -> None:
    """Writes the validation losses. ≈: no significant difference from as many heads as query heads."""
    rows = []
    for n, values in losses.items():
        config = stages.load("stage4_gqa").GPTConfig(n_kv_head=n, **presets.PRESETS["laptop"]["model"])
        noise = "" if spread.means_differ(values, losses[HEADS_TRAINED[0]]) else "≈ "
        loss = report.with_std(spread.summary(values), 3)
        rows.append([n, f"{bytes_per_token(config, 4):,}", noise * (n < HEADS_TRAINED[0]) + loss])
    heads = ["key/value heads for 4 query heads", "bytes a token", "validation loss"]
    summaries = {n: spread.summary(values) for n, values in losses.items()}
    ideas.write("shared_heads_loss", {"val_loss": summaries}, heads, rows)


def key_value_heads(n: int) -> str:
    """How the tables and the picture name a number of heads."""
    return f"{n} key/value head{'s' if n > 1 else ''}"


if __name__ == "__main__":
    cli.run(main)
