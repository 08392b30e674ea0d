"""What a model costs: parameters and FLOPs, counted on the real model and never by a formula."""

import torch
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: torch.nn.Module) -> int:
    """Number of parameters; a tied matrix counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: torch.nn.Module) -> float:
    """FLOPs of a forward and backward pass, per token, at the full context: those of a real step."""
    was_training = model.training
    model.eval()  # without dropout no random number is drawn
    idx = torch.zeros(1, model.config.block_size, dtype=torch.int64, device=model.lm_head.weight.device)
    with FlopCounterMode(display=False) as counter:
        _, losses = model(idx, targets=idx)
        sum(losses.values()).backward()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return counter.get_total_flops() / model.config.block_size
