"""The validation loss, over the same tokens every time."""

import math

import numpy as np
import torch

from lab import parallel
from lab.training import batches


@torch.no_grad()
def next_token_loss(
    model: torch.nn.Module, tokens: np.ndarray, limit: int, batch_size: int, autocast, device: torch.device
) -> float:
    """Mean cross-entropy in nats over the first `limit` targets of tokens, in windows of the context.

    Several processes share the batches; each gets the same number.
    """
    was_training = model.training
    model.eval()
    everything = list(batches.eval_batches(tokens, limit, batch_size, model.config.block_size))
    sums, sizes = [], []
    for first in range(0, len(everything), parallel.WORLD_SIZE):
        mine = first + parallel.RANK
        # With FSDP all must compute in step: who has no batch left repeats the last one, uncounted.
        idx, targets = everything[min(mine, len(everything) - 1)]
        with autocast:
            _, losses = model(idx.to(device), targets.to(device))
        size = (targets != -1).sum().item() if mine < len(everything) else 0
        sizes.append(size)
        sums.append(losses["next_token"] * size)
    model.train(was_training)
    found = torch.stack([torch.stack(sums).cpu().double().sum(), torch.tensor(sum(sizes)).double()])
    loss, n_targets = parallel.total(found)
    return (loss / n_targets).item()


def bits_per_byte(loss: float, meta: dict) -> float:
    """A loss in nats a token as bits per byte of text: comparable between tokenizers."""
    return loss / math.log(2) * meta["tokens"]["val"] / meta["bytes"]["val"]
