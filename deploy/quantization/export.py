"""Quantized weights for other programs: compressed-tensors for transformers and vLLM, GGUF for llama.cpp.

Nothing is quantized anew: the files hold the run's own codes, scales and zeros. Both formats reorder, join
and split matrices. So that codes and grid move together, each weight first becomes one word of 32 bits: its
code in the lowest 8, its group's zero in the next 8, and its group's scale, a bfloat16, in the upper 16.

A matrix that a format cannot hold exactly becomes floating-point numbers, and a line on stderr says so.
"""

import sys

import numpy as np
import torch

from deploy.quantization.grid import pack
from deploy.quantization.linear import Packed, QuantizedEmbedding, QuantizedLinear
from lab.errors import UserError
from lab.storage import checkpoint

BLOCK = 32  # numbers in a block of GGUF


def words(model: torch.nn.Module, to: str) -> dict[str, torch.Tensor]:
    """The model's tensors under their own names, quantized ones as int32 words.

    Raises UserError for grids that `to`, the name of a format, does not have.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, Packed)}
    for name, module in packed.items():
        if module.bits not in (4, 8):
            raise UserError(
                f"{name} has {module.bits} bits, which {to} cannot hold: it has 4 and 8\n"
                "quantize to 4 or 8 bits for other programs"
            )
    plain = [
        name
        for name, module in model.model.layers.named_modules(prefix="model.layers")
        if isinstance(module, torch.nn.Linear)
    ]
    if plain:  # they may be joined with quantized ones
        raise UserError(f"{plain[0]} is not quantized: {to} needs all projections of a model")
    tensors = {
        name: tensor
        for name, tensor in checkpoint.weights(model).items()
        if name.rpartition(".")[0] not in packed or name.endswith(".bias")
    }
    for name, module in packed.items():
        if isinstance(module, QuantizedLinear):
            tied = name == "lm_head" and isinstance(model.model.embed_tokens, QuantizedEmbedding)
            tensors["model.embed_tokens.weight" if tied else f"{name}.weight"] = words_of(module)
        else:
            tensors[name] = torch.stack([words_of(module, expert) for expert in range(module.shape[0])])
    return tensors


def words_of(module: Packed, *expert: int) -> torch.Tensor:
    """A matrix as words (out, in)."""
    q = module.quantized(*expert)
    grid = q.scale.bfloat16().view(torch.int16).int() << 16 | q.zero.int() << 8
    width = q.codes.size(1)
    return grid.repeat_interleave(q.group_size or width, 1)[:, :width] | q.codes.int()


def is_words(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a matrix (or stack) of words."""
    return tensor.dtype == torch.int32 and tensor.dim() > 1


def parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The codes, zeros and scales of words: uint8, uint8 and float32, in the words' shape."""
    scale = (tensor >> 16).to(torch.int16).view(torch.bfloat16).float()
    return (tensor & 255).to(torch.uint8), (tensor >> 8 & 255).to(torch.uint8), scale


def dense(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Words as the weights that they stand for, in dtype; other tensors as they are."""
    if tensor.dtype != torch.int32:  # a bias of zeros, which a format adds, is int32 too
        return tensor
    codes, zero, scale = parts(tensor)
    return ((codes.float() - zero.float()) * scale).to(dtype)


def say_what_is_dense(names: list[str], reason: str, dtype: str) -> None:
    """Says on stderr which matrices are not written as codes."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        print(f"written as {dtype}, because {reason}: {', '.join(names[:3])}{more}", file=sys.stderr)


def compress(
    tensors: dict[str, torch.Tensor], grids: list[dict], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict]:
    """Words under Hugging Face's names in the format pack-quantized, and the quantization_config for them.

    grids: as in the run's config.json. Embedding and head become dense.
    """
    stacks = [name for name in tensors if ".experts." in name]
    if stacks:
        raise UserError(
            f"compressed-tensors packs linear layers, but transformers stacks experts: {stacks[0]}\n"
            "export the run for llama.cpp: --to gguf"
        )
    body = [grid for grid in grids if grid["modules"] != ["lm_head"]]
    if len(body) != 1:
        raise UserError(
            "compressed-tensors is written with one number of bits and one group size, not several"
        )
    bits, size = body[0]["bits"], body[0]["group_size"]
    quantized, ragged, heads = {}, [], ["lm_head", "embed_out"]
    made = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if is_words(tensor) and "embed" not in name and module not in heads:
            if size and tensor.size(1) % size:
                ragged.append(module)
            else:
                quantized[module] = tensor
                continue
        made[name] = dense(tensor, dtype)
    say_what_is_dense(ragged, f"groups of {size} do not divide their rows", str(dtype).removeprefix("torch."))
    symmetric = all((parts(tensor)[1] == 2 ** (bits - 1)).all() for tensor in quantized.values())
    for module, tensor in quantized.items():
        codes, zero, scale = parts(tensor)
        step = size or tensor.size(1)
        made[f"{module}.weight_packed"] = as_int32(pack(codes, bits))
        made[f"{module}.weight_scale"] = scale[:, ::step].to(dtype)
        made[f"{module}.weight_shape"] = torch.tensor(tensor.shape)
        if not symmetric:  # packed along the other dimension
            made[f"{module}.weight_zero_point"] = as_int32(pack(zero[:, ::step].T, bits)).T
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "group" if size else "channel", "group_size": size}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return made, {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [*heads, *ragged],
        "config_groups": {"group_0": group},
        # Else transformers (5.23) expects zeros that are not packed, and refuses these.
        "dequantize": not symmetric,
    }


def as_int32(packed: torch.Tensor) -> torch.Tensor:
    """Bytes (rows, n) as little-endian int32 (rows, ceil(n / 4))."""
    padded = torch.nn.functional.pad(packed, (0, -packed.size(1) % 4))
    return padded.contiguous().view(torch.int32)


def block_type(tensor: torch.Tensor) -> str | None:
    """The type of GGUF that holds these words exactly: Q8_0, Q4_0 or Q4_1; None if there is none.

    All have blocks of 32 numbers with a scale in float16. Q4_1 also has a float16 for -scale * zero, which is
    exact for our grids (see grid.find_grid); the others have no zero.
    """
    if tensor.size(-1) % BLOCK:
        return None
    grid = (tensor >> 8).unflatten(-1, (-1, BLOCK))
    _, zero, scale = parts(tensor)
    if not (grid == grid[..., :1]).all() or not (scale.half().float() == scale).all():
        return None
    if zero.max() >= 16:
        return "Q8_0" if (zero == 128).all() else None
    return "Q4_0" if (zero == 8).all() else "Q4_1"


def blocks(tensor: torch.Tensor, kind: str) -> np.ndarray:
    """Words (…, in) as the bytes of GGUF's blocks (…, bytes)."""
    codes, zero, scale = (part.unflatten(-1, (-1, BLOCK)) for part in parts(tensor))
    scale = scale[..., :1]
    content = [scale.half().view(torch.uint8)]
    if kind == "Q8_0":
        content.append(codes ^ 128)  # code - 128 in two's complement
    else:
        if kind == "Q4_1":
            content.append((-scale * zero[..., :1].float()).half().view(torch.uint8))
        content.append(codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4)
    return torch.cat(content, -1).flatten(-2).numpy()
