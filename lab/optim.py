"""What a training step does: gradients, the learning rate, the optimizer."""

import math
from collections import defaultdict

import torch


def adamw(
    model: torch.nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Fused AdamW (arXiv 1711.05101); only parameters of two dimensions or more decay.

    A norm's weight or a bias has its best value away from zero; pulling it there helps nothing.
    """
    parameters = list(model.parameters())  # a tied matrix comes once
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def cosine_lr(step: int, steps: int, warmup_steps: int, lr: float, min_lr: float) -> float:
    """Learning rate of step 1 … steps: a linear warm-up to lr, then half a cosine down to min_lr."""
    if step <= warmup_steps:
        return lr * step / (warmup_steps + 1)
    progress = (step - 1 - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (lr - min_lr)


def accumulate_gradients(model, idx, targets, micro_batch: int, autocast) -> dict[str, torch.Tensor]:
    """Adds the batch's gradient to the parameters; returns each loss, averaged over all of the batch."""
    parts = list(zip(idx.split(micro_batch), targets.split(micro_batch), strict=True))
    totals = defaultdict(float)
    for idx_part, targets_part in parts:
        with autocast:
            _, losses = model(idx_part, targets_part)
        (sum(losses.values()) / len(parts)).backward()
        for name, loss in losses.items():
            totals[name] += loss.detach() / len(parts)
    return dict(totals)


def update(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, lr: float, grad_clip: float
) -> torch.Tensor:
    """One optimizer step with the gradients at hand, which it clears; returns their norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm
