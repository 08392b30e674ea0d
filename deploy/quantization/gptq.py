"""GPTQ: rounds column by column, and lets the columns that are left make up for each column's error.

Paper: Frantar et al. 2022, arXiv 2210.17323. `gptq` is its Algorithm 1, and takes the three steps of its
section 4: one order of columns for all rows, lazy batches of updates, and the Cholesky factor of the inverse
Hessian.
"""

import sys

import torch

from deploy.quantization.grid import Quantized, find_grid, to_codes
from lab.errors import UserError


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    group_size: int | None,
    act_order: bool = True,
    damping: float = 0.01,
    block: int = 128,
    mean_diagonal: float | None = None,
) -> Quantized:
    """Quantizes a weight (out, in) so that its outputs change little on inputs with this Hessian (in, in).

    The Hessian of the squared error of a row's outputs is 2XXᵀ, for inputs X (in, tokens); a factor does not
    matter. damping times the mean of its diagonal is added to the diagonal; mean_diagonal is that mean (None:
    this Hessian's). With act_order, columns with large inputs come first, while all others can still make up
    for their errors. block is the number of columns between two updates of all columns to the right: it
    changes the speed, not the result.
    """
    weight, hessian = weight.float().clone(), hessian.clone()
    n_in = weight.size(1)
    width = group_size or n_in
    dead = hessian.diagonal() == 0  # these inputs were always 0
    if mean_diagonal is None:
        mean_diagonal = hessian.diagonal().sum().item() / max(1, (~dead).sum().item())
    hessian[dead, dead] = 1
    weight[:, dead] = 0

    # With act_order, the grids are those of the original weights ("static groups"): a group's columns come at
    # different times, and no single moment would see all of them updated. So storage stays in plain order.
    scale, zero = find_grid(weight, bits, group_size)
    order = torch.arange(n_in, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    weight, hessian = weight[:, order], hessian[order][:, order]

    upper = inverse_factor(hessian, damping * mean_diagonal)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, n_in, block):
        end = min(start + block, n_in)
        current = weight[:, start:end]  # a view: its columns are updated in place
        errors = torch.zeros_like(current)
        for i in range(end - start):
            column = start + i  # in the whole matrix; i counts within the block
            group = int(order[column]) // width
            if not act_order and column % width == 0:  # the first of a group: its grid, from updated weights
                columns = updated(weight, errors, upper, column, min(column + width, n_in), start, end)
                group_scale, group_zero = find_grid(columns, bits, None)
                scale[:, group], zero[:, group] = group_scale[:, 0], group_zero[:, 0]
            grid = scale[:, group, None], zero[:, group, None]
            codes[:, column] = to_codes(current[:, i, None], *grid, bits, None)[:, 0]
            rounded = (codes[:, column].float() - grid[1][:, 0].float()) * grid[0][:, 0].float()
            errors[:, i] = (current[:, i] - rounded) / upper[column, column]
            current[:, i:] -= errors[:, i, None] * upper[column, column:end]
        weight[:, end:] -= errors @ upper[start:end, end:]
    return Quantized(codes[:, order.argsort()], scale, zero, bits, group_size)


def updated(weight, errors, upper, first: int, last: int, start: int, end: int) -> torch.Tensor:
    """Columns first to last (excluded) of a weight, with the corrections of all columns before the first.

    Those within the current block, start to end, have them already. Those after it still lack the block's.
    """
    after = weight[:, end:last] - errors @ upper[start:end, end:last]  # errors of coming columns are still 0
    return torch.cat((weight[:, first : min(last, end)], after), dim=1)


def inverse_factor(hessian: torch.Tensor, ridge: float) -> torch.Tensor:
    """The upper triangular U with UᵀU = (hessian + ridge · 1)⁻¹, in float32.

    Row i of U, divided by its diagonal, says how the columns after i make up for an error in column i, once
    those before it are fixed (section 4, step 3). Where float32 is not precise enough, it is computed in
    float64, and then with ten times the ridge, and so on; a line on stderr says so.
    """
    for dtype, more in [(torch.float32, 1)] + [(torch.float64, 10**power) for power in range(6)]:
        damped = hessian.to(dtype, copy=True)
        damped.diagonal().add_(ridge * more)
        try:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
            factor = torch.linalg.cholesky(inverse, upper=True).float()
        except torch.linalg.LinAlgError:
            continue
        if more > 1:
            print(
                f"warning: a Hessian of {len(hessian)} inputs is not positive definite: "
                f"its damping is {more} times as large",
                file=sys.stderr,
            )
        return factor
    raise UserError(
        f"a Hessian of {len(hessian)} inputs has no Cholesky factor, even with {more} times the damping\n"
        "calibrate on other text, or more of it"
    )
