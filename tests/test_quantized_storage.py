"""The grid of quantized weights, their packing, the modules that compute with them, and their files."""

import pytest
import torch

from deploy.quantization.grid import BITS, Quantized, dequantize, find_grid, pack, to_codes, unpack


def quantized(weight, bits, group_size, **options):
    """The weight rounded to its nearest codes."""
    scale, zero = find_grid(weight, bits, group_size, **options)
    return Quantized(to_codes(weight, scale, zero, bits, group_size), scale, zero, bits, group_size)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 7, 8, 43, 64])
def test_packed_codes_come_back_bit_for_bit(bits, width):
    codes = torch.randint(0, 2**bits, (5, width), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, -(-width // 8) * bits)
    assert torch.equal(unpack(packed, bits, width), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_moves_no_weight_by_more_than_half_a_step(bits, group_size, symmetric):
    """Also in a ragged last group. Half a step more at the ends: the zero and the scale are rounded too."""
    weight = torch.randn(16, 172) * 0.02 + 0.01
    q = quantized(weight, bits, group_size, symmetric=symmetric)
    assert q.scale.shape == q.zero.shape == (16, 1 if group_size is None else -(-172 // group_size))
    steps = (dequantize(q) - weight).abs() / q.scale.repeat_interleave(group_size or 172, 1)[:, :172]
    assert steps.max() <= 1.1
    assert (steps <= 0.5 + 1e-4).float().mean() > 0.85
    assert torch.equal(q.scale, q.scale.bfloat16().float())
    assert q.zero.min() >= 0 and q.zero.max() < 2**bits and torch.equal(q.zero, q.zero.round())


@pytest.mark.parametrize("bits", BITS)
def test_values_on_the_grid_are_kept_exactly(bits):
    """Quantizing what has been dequantized gives the same codes, and zero weights stay zero."""
    weight = torch.randn(8, 96)
    weight[3] = 0
    weight[:, 10] = 0
    q = quantized(weight, bits, 32)
    again = to_codes(dequantize(q), q.scale, q.zero, bits, 32)
    assert torch.equal(again, q.codes)
    assert not dequantize(q)[3].any() and not dequantize(q)[:, 10].any()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_row_of_one_sign_keeps_its_range(sign):
    weight = sign * (torch.rand(4, 64) + 0.5)
    q = quantized(weight, 4, 64)
    assert (dequantize(q) - weight).abs().max() <= 0.6 * q.scale.max()


def test_shrinking_clips_the_range():
    weight = torch.randn(4, 64)
    clipped = dequantize(quantized(weight, 8, 64, shrink=0.5))
    assert clipped.abs().amax(1).sub(0.5 * weight.abs().amax(1)).abs().max() < 0.05
