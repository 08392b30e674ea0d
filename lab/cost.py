"""What a model costs: parameters and FLOPs, counted on the real model and never by a formula."""

import torch
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: torch.nn.Module) -> int:
    """Number of parameters; a tied matrix counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model_class: type, config) -> float:
    """FLOPs of a forward and backward pass, per token, at the full context.

    Counted on the meta device: every operation of a real step happens, on shapes alone.
    """
    with torch.device("meta"):
        model = model_class(config)
        idx = torch.zeros(1, config.block_size, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        _, losses = model(idx, targets=idx)
        sum(losses.values()).backward()
    return counter.get_total_flops() / config.block_size
