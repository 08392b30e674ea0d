"""What holds for a right solution: shown when a wrong one matches no known mistake. True if it holds."""

import torch

from exercises.probe import in_steps, random, small_model, tokens


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * (1 + b.abs().max()))


def no_leak(module) -> bool:
    """Changing a later token changes no earlier logits."""
    model, idx = small_model(module), tokens(2, 11)
    changed = idx.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 29
    return close(model(idx)[0][:, :6], model(changed)[0][:, :6])


def cache_equals_no_cache(module) -> bool:
    """With a cache, a few tokens at a time, the logits are the same."""
    model, idx = small_model(module), tokens(2, 11)
    return close(in_steps(model, idx, (4, 1, 1, 5))[0], model(idx)[0])


def norm_is_kept(module) -> bool:
    """Rotating a vector keeps its length."""
    x = random(2, 3, 6, 8, seed=1)
    rotated = module.rotate(x, module.rotation(torch.arange(6), 8, 100.0))
    return close(rotated.norm(dim=-1), x.norm(dim=-1))


def distance_only(module) -> bool:
    """The product of a rotated query and a rotated key depends on the difference of their positions only."""
    q, k = random(1, 1, 1, 8, seed=1), random(1, 1, 1, 8, seed=2)
    score = []
    for shift in (0, 5, 31):
        at = [module.rotation(torch.tensor([position + shift]), 8, 100.0) for position in (7, 3)]
        score.append((module.rotate(q, at[0]) * module.rotate(k, at[1])).sum())
    return close(score[1], score[0]) and close(score[2], score[0])


def position_0_is_unchanged(module) -> bool:
    """At position 0 nothing is rotated."""
    x = random(2, 3, 1, 8, seed=1)
    return close(module.rotate(x, module.rotation(torch.arange(1), 8, 100.0)), x)
