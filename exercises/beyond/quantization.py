"""Exercise 8.3, beyond grid.py: the loop of GPTQ on its own, as deploy/quantization/gptq.py has it."""

import torch

from deploy.quantization.grid import find_grid, to_codes


def round_columns(weight: torch.Tensor, hessian: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (out, in) uint8 of a weight (out, in), rounded column by column, from the first to the last.

    hessian (in, in) is XXᵀ of the inputs X (in, tokens), with the damping added. Each row has one grid, that
    of the original weight. After a column is rounded, those after it make up for its error:

        e = (w_i - q_i) / U_ii,    w_j = w_j - e U_ij for all j > i

    where U is upper triangular and UᵀU is the inverse of the Hessian. (arXiv 2210.17323, algorithm 1)
    """
    scale, zero = find_grid(weight, bits, None)  # (out, 1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    current, codes = weight.clone(), torch.empty(weight.shape, dtype=torch.uint8)
    for i in range(weight.size(1)):
        codes[:, i] = to_codes(current[:, i, None], scale, zero, bits, None)[:, 0]
        rounded = (codes[:, i].float() - zero[:, 0]) * scale[:, 0]
        error = (current[:, i] - rounded) / upper[i, i]
        current[:, i:] -= error[:, None] * upper[i, i:]
    return codes
