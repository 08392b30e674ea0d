"""What a model costs: its parameters and FLOPs, counted on the real model, not computed by a formula."""

import torch


def parameters(model: torch.nn.Module) -> int:
    """Number of parameters; a tied matrix counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def active_parameters(model: torch.nn.Module) -> int:
    """Number of parameters used for one token's logits; of the routed experts only those that it uses count.

    The MTP blocks, which follow the model's own n_layer blocks, do not count.
    """
    used = 1.0
    if hasattr(model.config, "n_routed_experts"):
        used = model.config.num_experts_per_tok / model.config.n_routed_experts
    extra = {id(p) for layer in model.model.layers[model.config.n_layer :] for p in layer.parameters()}
    counted = [p for p in model.parameters() if id(p) not in extra]
    return sum(round(p.numel() * used) if p.dim() == 3 else p.numel() for p in counted)


def grouped_mm_flops(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    """FLOPs of a grouped matrix product (one expert per row), which FlopCounterMode does not know."""
    if len(b_shape) == 3:  # (N, in) @ (E, in, out)
        return 2 * a_shape[0] * b_shape[1] * b_shape[2]
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]  # (in, N) @ (N, out), one product per expert


def flops_per_token(model: torch.nn.Module, context: int | None = None) -> float:
    """FLOPs per token of a forward and backward pass over `context` tokens, as in a real training step.

    If context is None, it is the model's block_size. They are counted on the meta device, which stores no
    data, so they are the same on every device. There, SDPA counts as its matrix products; on a real device it
    may be a fused kernel unknown to the counter.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton if it is installed

    context = context or model.config.block_size
    with torch.device("meta"):
        bare = type(model)(model.config).eval()  # no dropout, so no random numbers are drawn
        idx = torch.zeros(1, context, dtype=torch.int64)
    group_experts(bare)
    unknown = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        _, losses = bare(idx, targets=idx)
        sum(losses.values()).backward()
    return counter.get_total_flops() / context


def group_experts(bare: torch.nn.Module) -> None:
    """Makes a model on the meta device compute only the chosen experts; this requires bfloat16 there."""
    for layer in bare.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(lambda _, given: (given[0].bfloat16(), *given[1:]))
