"""Token files to batches: random windows to train on, the same windows every time to evaluate on."""

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

    A pure function of its arguments: evaluating, resuming or another model never shifts the data.
    Reads only these windows of memory-mapped files; only the rows given, which are those of one process.
    """
    random = np.random.default_rng((seed, step))
    starts = random.integers(len(tokens) - block_size, size=batch_size)
    if rows is not None:
        starts = starts[rows]
    if isinstance(tokens, np.memmap):
        tokens = np.asarray(tokens)  # the same memory, of which a slice is made in a third of the time
    windows = np.stack([tokens[start : start + block_size + 1] for start in starts])
    windows = torch.from_numpy(windows.astype(np.int64))  # (batch_size, block_size + 1)
    return windows[:, :-1], windows[:, 1:]


def eval_batches(
    tokens: np.ndarray | Shards, limit: int, batch_size: int, block_size: int
) -> Iterator[tuple]:
    """Windows side by side over the first `limit` targets: idx and targets (batch_size, block_size).

    Every token but the first is a target exactly once; the last windows are filled with targets of -1.
    """
    n_targets = min(limit, len(tokens) - 1)
    span = batch_size * block_size
    for start in range(0, n_targets, span):
        end = min(start + span, n_targets)
        idx = np.zeros(span, dtype=np.int64)
        targets = np.full(span, -1, dtype=np.int64)
        idx[: end - start] = tokens[start:end]
        targets[: end - start] = tokens[start + 1 : end + 1]
        rows = math.ceil((end - start) / block_size)  # without the rows that hold nothing but filling
        shape = (batch_size, block_size)
        yield torch.from_numpy(idx).view(shape)[:rows], torch.from_numpy(targets).view(shape)[:rows]
