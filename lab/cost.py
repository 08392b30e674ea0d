"""What a model costs: parameters and FLOPs, counted on the real model and never by a formula."""

import torch
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: torch.nn.Module) -> int:
    """Number of parameters; a tied matrix counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def active_parameters(model: torch.nn.Module) -> int:
    """Number of parameters that compute one token's logits: of the routed experts those that a token uses.

    The blocks of multi-token prediction, which follow the model's own n_layer, do not count.
    """
    used = 1.0
    if hasattr(model.config, "n_routed_experts"):
        used = model.config.num_experts_per_tok / model.config.n_routed_experts
    extra = {id(p) for layer in model.model.layers[model.config.n_layer :] for p in layer.parameters()}
    counted = [p for p in model.parameters() if id(p) not in extra]
    return sum(round(p.numel() * used) if p.dim() == 3 else p.numel() for p in counted)


def grouped_mm_flops(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    """FLOPs of a grouped matrix product, which FlopCounterMode does not know: a row meets one expert."""
    if len(b_shape) == 3:  # (N, in) @ (E, in, out)
        return 2 * a_shape[0] * b_shape[1] * b_shape[2]
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]  # (in, N) @ (N, out), a product for each expert


def flops_per_token(model: torch.nn.Module) -> float:
    """FLOPs of a forward and backward pass, per token, at the full context: those of a real step."""
    was_training = model.training
    model.eval()  # without dropout no random number is drawn
    idx = torch.zeros(1, model.config.block_size, dtype=torch.int64, device=model.lm_head.weight.device)
    unknown = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        _, losses = model(idx, targets=idx)
        sum(losses.values()).backward()
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return counter.get_total_flops() / model.config.block_size
