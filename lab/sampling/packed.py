"""Weights in the layout that oneDNN reads fastest: a large model decodes 1.2 to 1.5 times as fast on a CPU.

A token needs every weight once, so the time to read them from memory bounds the speed. oneDNN, torch's
library of matrix products on a CPU, reads its own layout, in blocks, up to twice as fast as rows one after
another. inductor uses the same two operations when it freezes a model.
"""

from collections.abc import Callable

import torch

SMALLEST = 64 * 2**20  # bytes of a model's matrices. Smaller ones may stay in the processor's cache
# Modules whose weight the model reads itself: absorbed latent attention multiplies by parts of it.
READ_BY_THE_MODEL = ("kv_b_proj",)


def one_row_layout(weight: torch.Tensor) -> torch.Tensor:
    """The weight in the layout for one row: decoding. More rows are faster than with a plain one, too."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)


class PackedLinear(torch.nn.Module):
    """Stands in for an nn.Linear when its weight need not change: x (…, in) -> (…, out)."""

    def __init__(self, linear: torch.nn.Linear, layout: Callable = one_row_layout):
        super().__init__()
        self.register_buffer("packed", layout(linear.weight.detach()), persistent=False)
        self.bias = linear.bias
        self.weight = linear.weight.detach().new_empty(0)  # says the dtype and the device

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def pack(model: torch.nn.Module) -> bool:
    """Replaces the model's linear layers, if that makes it faster. Returns whether it did.

    It does for large models on a CPU, in a dtype that oneDNN multiplies there. Experts stay as they are: they
    are stacks and no linear layers.
    """
    weights = (getattr(parent, name).weight for parent, name in linears(model))
    if sum(weight.nbytes for weight in weights) < SMALLEST or not can_pack(next(model.parameters())):
        return False
    replace_linears(model)
    return True


def linears(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str]]:
    """The linear layers that can be packed, each as its parent and its name there."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear and name not in READ_BY_THE_MODEL
    ]


def replace_linears(model: torch.nn.Module, layout: Callable = one_row_layout) -> None:
    """Puts a PackedLinear in the place of each; one by one, so that few matrices are in memory twice."""
    for parent, name in linears(model):
        setattr(parent, name, PackedLinear(getattr(parent, name), layout))


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN can pack a weight on its device."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.inference_mode():
            torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=weight.dtype), 1)
    except (RuntimeError, AttributeError):  # a dtype that the processor or this PyTorch does not support
        return False
    return True
