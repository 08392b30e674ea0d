"""The grid of a quantized matrix: which values its codes stand for.

The weights of a group (`group_size` neighbours in a row, or the whole row) share a scale and a zero:

    weight ≈ (code - zero) * scale,    code and zero in 0 … 2**bits - 1

The last group of a row is shorter if the row's width is not a multiple of the group size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

BITS = (2, 3, 4, 8)


class Quantized(NamedTuple):
    """A matrix as codes on a grid."""

    codes: torch.Tensor
    """(out, in) uint8, in 0 … 2**bits - 1."""
    scale: torch.Tensor
    """(out, groups): the distance between two neighbouring values. Its numbers are exact in bfloat16."""
    zero: torch.Tensor
    """(out, groups): the code that stands for 0.0; whole numbers in the codes' range."""
    bits: int
    group_size: int | None
    """Number of weights with the same scale and zero. None: the whole row."""


def find_grid(
    weight: torch.Tensor, bits: int, group_size: int | None, shrink: float = 1.0, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the zero of each group, both (out, groups) float32, from its smallest and largest weight.

    `shrink` multiplies the range; weights outside it are clipped. A symmetric grid has its zero in the
    middle: half of the codes are for negative weights. At 8 bits the grid is always symmetric, because the
    8-bit kernels and file formats know no zero, and 256 values can afford it. The scale is rounded to
    bfloat16, as it is stored: a method that corrects rounding errors must see the same grid as the model.
    With a zero it is rounded to 7 bits, one fewer, so that scale * zero is exact in GGUF's float16 (11 bits).
    """
    highest = 2**bits - 1
    groups = in_groups(weight.float(), group_size)  # (out, groups, group_size)
    low = groups.amin(-1).clamp(max=0) * shrink  # 0.0 is always on the grid, so the padding changes nothing
    high = groups.amax(-1).clamp(min=0) * shrink
    if symmetric or bits == 8:
        zero = torch.full_like(low, 2 ** (bits - 1))
        scale = torch.maximum(-low / zero, high / (highest - zero))
    else:
        mantissa, exponent = torch.frexp((high - low) / highest)
        scale = torch.ldexp((mantissa * 2**7).round(), exponent - 7)
    scale = scale.bfloat16().float()
    scale = torch.where(scale > 0, scale, 1)  # a group of zeros
    if not (symmetric or bits == 8):
        zero = (-low / scale).round().clamp(0, highest)
    return scale, zero


def to_codes(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, group_size: int | None
) -> torch.Tensor:
    """The codes (out, in) of the grid values nearest to the weights; uint8."""
    scale, zero = by_column(scale, weight.size(1), group_size), by_column(zero, weight.size(1), group_size)
    return ((weight.float() / scale).round() + zero.float()).clamp(0, 2**bits - 1).to(torch.uint8)


def dequantize(q: Quantized) -> torch.Tensor:
    """The weights (out, in) that the codes stand for, float32."""
    width = q.codes.size(1)
    scale, zero = by_column(q.scale, width, q.group_size), by_column(q.zero, width, q.group_size)
    return (q.codes.float() - zero.float()) * scale.float()


def in_groups(weight: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """weight (out, in) as (out, groups, group_size). A shorter last group is filled up with zeros."""
    group_size = group_size or weight.size(1)
    return F.pad(weight, (0, -weight.size(1) % group_size)).unflatten(1, (-1, group_size))


def by_column(per_group: torch.Tensor, width: int, group_size: int | None) -> torch.Tensor:
    """Repeats (out, groups) for each column: (out, width)."""
    return per_group.repeat_interleave(group_size or width, dim=1)[:, :width]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (out, in) as bytes (out, ceil(in / 8) * bits): 8 codes in `bits` bytes, low bits first."""
    eights = F.pad(codes, (0, -codes.size(1) % 8)).unflatten(1, (-1, 8)).long()
    words = (eights << (bits * torch.arange(8, device=codes.device))).sum(-1)  # (out, in / 8) of 64 bits
    return words.unsqueeze(-1).contiguous().view(torch.uint8)[..., :bits].flatten(1)


def unpack(packed: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Undoes `pack`: the codes (out, width), uint8."""
    if bits == 8:
        return packed[:, :width]
    if bits == 3:  # codes cross the borders of bytes
        words = F.pad(packed.unflatten(1, (-1, 3)), (0, 5)).contiguous().view(torch.int64)
        codes = ((words >> (3 * torch.arange(8, device=packed.device))) & 7).to(torch.uint8)
    else:  # 2 or 4 codes in a byte; three times as fast
        codes = torch.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)
    return codes.flatten(1)[:, :width]
