"""Turns token files into batches: random windows for training, always the same windows for evaluation."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from data import Shards


def train_batch(
    tokens: np.ndarray | Shards,
    seed: int,
    step: int,
    batch_size: int,
    block_size: int,
    rows: np.ndarray | None = None,
) -> tuple:
    """The batch of an optimizer step: idx and targets, each (batch_size, block_size) int64.

    A pure function of its arguments, so evaluating, resuming or changing the model never shifts the data.
    Only these windows are read from memory-mapped files. rows: those of this process; None: all rows.
    """
    random = np.random.default_rng((seed, step))
    starts = random.integers(len(tokens) - block_size, size=batch_size)
    if rows is not None:
        starts = starts[rows]
    if isinstance(tokens, np.memmap):
        tokens = np.asarray(tokens)  # the same memory, but slicing takes a third of the time
    windows = np.stack([tokens[start : start + block_size + 1] for start in starts])
    windows = torch.from_numpy(windows.astype(np.int64))  # (batch_size, block_size + 1)
    return windows[:, :-1], windows[:, 1:]


def eval_batches(
    tokens: np.ndarray | Shards, limit: int, batch_size: int, block_size: int
) -> Iterator[tuple]:
    """Adjacent windows over the first `limit` targets: idx and targets, each (batch_size, block_size).

    Every token but the first is a target exactly once. The last window is padded with targets of -1, and the
    last batch may have fewer rows.
    """
    n_targets = min(limit, len(tokens) - 1)
    span = batch_size * block_size
    for start in range(0, n_targets, span):
        end = min(start + span, n_targets)
        idx = np.zeros(span, dtype=np.int64)
        targets = np.full(span, -1, dtype=np.int64)
        idx[: end - start] = tokens[start:end]
        targets[: end - start] = tokens[start + 1 : end + 1]
        rows = math.ceil((end - start) / block_size)  # drops rows that are only padding
        shape = (batch_size, block_size)
        yield torch.from_numpy(idx).view(shape)[:rows], torch.from_numpy(targets).view(shape)[:rows]
