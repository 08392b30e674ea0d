"""Exercise 5.1, beyond the stage: the softmax of a row in one pass, before its maximum is known."""

import torch


def online_average(
    scores: torch.Tensor, values: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scores) @ values, and log(sum(exp(scores))), from one pass over `block` keys at a time.

    scores (S,), of which the first is finite and others may be -inf, and values (S, head_dim) -> (head_dim,)
    and (). The last block may be shorter. (arXiv 1805.02867; arXiv 2307.08691, section 2.3)
    """
    row_max = torch.full((), -torch.inf)  # running maximum of the scores
    row_sum = torch.zeros(())  # running sum of exp(score - row_max)
    o = torch.zeros(values.size(1))
    for start in range(0, len(scores), block):
        s, v = scores[start : start + block], values[start : start + block]
        new_max = torch.maximum(row_max, s.max())
        p = torch.exp(s - new_max)
        rescale = torch.exp(row_max - new_max)
        row_sum = rescale * row_sum + p.sum()
        o = rescale * o + p @ v
        row_max = new_max
    return o / row_sum, row_max + row_sum.log()
