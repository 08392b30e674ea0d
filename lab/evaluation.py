"""The validation loss, over the same tokens every time."""

import math

import numpy as np
import torch

from lab import batches


@torch.no_grad()
def next_token_loss(
    model: torch.nn.Module, tokens: np.ndarray, limit: int, batch_size: int, autocast, device: torch.device
) -> float:
    """Mean cross-entropy in nats over the first `limit` targets of tokens, in windows of the context."""
    was_training = model.training
    model.eval()
    total, n_targets = 0.0, 0
    for idx, targets in batches.eval_batches(tokens, limit, batch_size, model.config.block_size):
        with autocast:
            _, losses = model(idx.to(device), targets.to(device))
        n = (targets != -1).sum().item()
        total += losses["next_token"].double() * n
        n_targets += n
    model.train(was_training)
    return (total / n_targets).item()


def bits_per_byte(loss: float, meta: dict) -> float:
    """A loss in nats a token as bits per byte of text: comparable between tokenizers."""
    return loss / math.log(2) * meta["tokens"]["val"] / meta["bytes"]["val"]
