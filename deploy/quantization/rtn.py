"""Round to nearest (RTN): every weight becomes the grid point next to it. It needs no text.

It is the baseline of the other methods, and their last step: AWQ moves the weights before it, GPTQ corrects
the weights that are still to come after each column.
"""

import torch

from deploy.quantization.grid import Quantized, find_grid, to_codes


def rtn(weight: torch.Tensor, bits: int, group_size: int | None) -> Quantized:
    """Rounds a weight (out, in) on a grid of 2**bits points for each row and group of group_size columns."""
    weight = weight.float()
    scale, zero = find_grid(weight, bits, group_size)
    return Quantized(to_codes(weight, scale, zero, bits, group_size), scale, zero, bits, group_size)
