"""Exercise 4.3, beyond the stage: a model trained with one key/value head per query head gets groups."""

import torch


def average_heads(weights: dict[str, torch.Tensor], n_kv_head: int, head_dim: int) -> dict[str, torch.Tensor]:
    """The weights of stage 3 by name -> weights for stage 4 with n_kv_head key/value heads.

    Of k_proj and v_proj, whose rows (n_head · head_dim, n_embd) are n_head heads, each group of neighbouring
    heads becomes their mean: (n_kv_head · head_dim, n_embd). All other weights stay. (arXiv 2305.13245, 2.1)
    """
    grouped = dict(weights)
    for name, weight in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = weight.unflatten(0, (n_kv_head, -1, head_dim))  # (n_kv_head, group, head_dim, n_embd)
            grouped[name] = heads.mean(1).flatten(0, 1)
    return grouped
