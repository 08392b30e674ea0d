"""Exercise 2.4, beyond the stage: weights for a program that rotates neighbouring dimensions."""

import torch


def to_neighbours(weights: dict[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    """The weights for code that rotates the pairs (2i, 2i + 1), as Meta's does, not (i, i + head_dim/2).

    The rows of q_proj and k_proj (n_head · head_dim, n_embd) are reordered within each head, so that the two
    rows of a pair become neighbours. All other weights stay.
    """
    converted = dict(weights)
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = weight.unflatten(0, (-1, 2, head_dim // 2))  # (n_head, 2, head_dim/2, n_embd)
            converted[name] = heads.transpose(1, 2).flatten(0, 2)
    return converted
