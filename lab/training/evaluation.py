"""The validation loss, over the same tokens every time."""

import math

import numpy as np
import torch

from lab import parallel
from lab.training import batches


@torch.no_grad()
def next_token_loss(
    model: torch.nn.Module,
    tokens: np.ndarray,
    limit: int,
    batch_size: int,
    autocast,
    device: torch.device,
    context: int | None = None,
) -> float:
    """Mean cross-entropy in nats over the first `limit` targets of tokens, in windows of `context` tokens.

    If context is None, the windows are block_size tokens long. Several processes share the
    batches; each returns the same number.
    """
    was_training = model.training
    model.eval()
    all_batches = list(batches.eval_batches(tokens, limit, batch_size, context or model.config.block_size))
    sums, sizes = [], []
    for first in range(0, len(all_batches), parallel.WORLD_SIZE):
        number = first + parallel.RANK
        # FSDP needs a forward pass from every process: one without a batch repeats the last one, uncounted.
        idx, targets = all_batches[min(number, len(all_batches) - 1)]
        with autocast:
            _, losses = model(idx.to(device), targets.to(device))
        size = (targets != -1).sum().item() if number < len(all_batches) else 0
        sizes.append(size)
        sums.append(losses["next_token"] * size)
    model.train(was_training)
    totals = torch.stack([torch.stack(sums).cpu().double().sum(), torch.tensor(sum(sizes)).double()])
    loss, n_targets = parallel.total(totals)
    return (loss / n_targets).item()


def bits_per_byte(loss: float, meta: dict) -> float:
    """Converts a loss in nats per token to bits per byte of text, which can be compared across tokenizers."""
    return loss / math.log(2) * meta["tokens"]["val"] / meta["bytes"]["val"]
