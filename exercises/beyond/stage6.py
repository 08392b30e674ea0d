"""Exercise 6.4, beyond the stage: the mixture of experts as a loop, before it is sorted in 6.5."""

import torch
import torch.nn.functional as F


def looped_experts(x, weights, indices, gate_up, down):
    """The same as grouped_experts, with a loop over the experts.

    x (N, n_embd); weights and indices (N, k) of the chosen experts; gate_up (E, n_embd, 2 width), gate before
    up; down (E, width, n_embd) -> (N, n_embd) in x's dtype: the sum of the weighted outputs.
    """
    y = torch.zeros(x.shape, dtype=weights.dtype, device=x.device)
    for e in range(len(down)):
        token, choice = (indices == e).nonzero(as_tuple=True)  # (n,) each: the tokens that chose expert e
        gate, up = (x[token] @ gate_up[e]).chunk(2, dim=-1)  # (n, width)
        output = (F.silu(gate) * up) @ down[e]  # (n, n_embd)
        y.index_add_(0, token, output * weights[token, choice, None])
    return y.type_as(x)
