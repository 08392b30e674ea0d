"""Passes text through a model, layer by layer, and quantizes each matrix when its input arrives.

All calibration tokens go through a layer in one pass. Whenever they reach a matrix, a hook computes the
Hessian of the input, quantizes the matrix, and lets the pass go on with the quantized weights. So every
matrix sees the errors of those before it ("true-sequential": q, k and v, then o, then gate and up, then
down), and only one Hessian is in memory. Nothing here depends on a stage's code: the hooks find its linear
layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from deploy.quantization.grid import Quantized, dequantize
from lab.errors import UserError

RARE = 32  # an expert that gets fewer tokens than this is rounded to nearest

# quantize(name, weight (out, in), Hessian (in, in) or None, mean of the diagonal or None). Without a Hessian,
# too few tokens were seen: round to nearest.
Method = Callable[[str, torch.Tensor, torch.Tensor | None, float | None], Quantized]


@dataclass
class Done:
    """What the quantization of one layer gives."""

    quantized: dict[str, Quantized | list[Quantized]] = field(default_factory=dict)
    """By the name of the module in the layer; of stacked experts, by that of the parameter: a list."""
    errors: dict[str, float] = field(default_factory=dict)
    """By the same names: the squared error of the outputs relative to their square. Experts: the mean."""
    rare: dict[str, list[int]] = field(default_factory=dict)
    """By the same names: the experts that were rounded to nearest, because they got too few tokens."""


class Arrived(Exception):
    """Ends a forward pass once it has reached the first layer."""


def first_inputs(model: nn.Module, idx: torch.Tensor) -> tuple:
    """The arguments of the first layer for idx (B, T): its input (B, T, n_embd), and rope, mask, cache."""
    arguments = []

    def stop(module, inputs):
        arguments.extend(inputs)
        raise Arrived

    handle = model.model.layers[0].register_forward_pre_hook(stop)
    try:
        model(idx)
    except Arrived:
        pass
    finally:
        handle.remove()
    return tuple(arguments)


def quantize_layer(layer: nn.Module, args: tuple, quantize: Method) -> tuple[torch.Tensor, Done]:
    """Quantizes the layer's matrices in place, in the order in which its forward pass reaches them.

    Returns the layer's output, computed with the quantized matrices, and what was done.
    """
    done, handles = Done(), []
    latest = [None, None]  # an input and its Hessian: q, k and v have the same one

    def linear(name):
        def arrive(module, inputs):
            if latest[0] is not inputs[0]:
                latest[:] = inputs[0], hessian_of(inputs[0], name)
            hessian = latest[1]
            q = quantize(name, module.weight.data, hessian, None)
            done.errors[name] = relative_error(module.weight.data, q, hessian)
            done.quantized[name] = q
            module.weight.data = dequantize(q)

        return arrive

    def experts(name):
        def arrive(module, inputs):
            quantize_experts(name, module, *inputs, quantize, done)

        return arrive

    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(linear(name)))
        elif is_experts(module):
            handles.append(module.register_forward_pre_hook(experts(name)))
    try:
        return layer(*args), done
    finally:
        for handle in handles:
            handle.remove()


def is_experts(module: nn.Module) -> bool:
    """Whether a module is stacked experts: gate_up_proj (E, 2 width, in) and down_proj (E, in, width)."""
    stacks = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return all(isinstance(stack, nn.Parameter) for stack in stacks)


def quantize_experts(name: str, experts: nn.Module, x, weights, indices, quantize: Method, done: Done):
    """Quantizes stacked experts, each on the tokens routed to it: x (N, in), indices (N, k)."""
    inputs = [x[(indices == e).any(-1)] for e in range(len(experts.down_proj))]
    experts.gate_up_proj.data = quantize_stack(
        f"{name}.gate_up_proj", experts.gate_up_proj.data, inputs, quantize, done
    )
    hidden = []
    for tokens, gate_up in zip(inputs, experts.gate_up_proj.data, strict=True):
        gate, up = (tokens @ gate_up.T).chunk(2, dim=-1)
        hidden.append(F.silu(gate) * up)
    experts.down_proj.data = quantize_stack(
        f"{name}.down_proj", experts.down_proj.data, hidden, quantize, done
    )


def quantize_stack(
    name: str, stack: torch.Tensor, inputs: list[torch.Tensor], quantize: Method, done: Done
) -> torch.Tensor:
    """Quantizes each expert's matrix of a stack (E, out, in) on its own inputs (tokens, in).

    The Hessians are sums over tokens, all divided by the same number, and their damping is relative to the
    diagonal's mean over all experts: the fewer tokens an expert gets, the closer it is to round to nearest.
    Below RARE tokens it is exactly that. Returns the dequantized stack.
    """
    everything = torch.cat(inputs)
    mean_diagonal = 2 * everything.float().square().mean().item()
    per_expert = len(everything) / len(inputs)
    found, errors, rare = [], [], []
    for e, tokens in enumerate(inputs):
        hessian = None
        if len(tokens) >= RARE:
            hessian = hessian_of(tokens, name) * (len(tokens) / per_expert)
        else:
            rare.append(e)
        found.append(quantize(name, stack[e], hessian, mean_diagonal))
        if len(tokens):
            errors.append(relative_error(stack[e], found[-1], hessian_of(tokens, name)))
    done.quantized[name], done.errors[name] = found, sum(errors) / max(1, len(errors))
    if rare:
        done.rare[name] = rare
    return torch.stack([dequantize(q) for q in found])


def hessian_of(x: torch.Tensor, name: str) -> torch.Tensor:
    """2XXᵀ / tokens (in, in) in float32, for the input x (…, in) of the module called name."""
    x = x.reshape(-1, x.size(-1)).float()
    hessian = (x.T @ x).mul_(2 / len(x))
    if not hessian.isfinite().all():
        raise UserError(
            f"the input of {name} is not finite on the calibration text\nuse a run whose loss is finite there"
        )
    return hessian


def relative_error(weight: torch.Tensor, q: Quantized, hessian: torch.Tensor) -> float:
    """The mean square of the change of a matrix's outputs, relative to that of the outputs themselves."""
    change = weight - dequantize(q)
    total = ((weight @ hessian) * weight).sum()
    return (((change @ hessian) * change).sum() / total.clamp(min=1e-30)).item()
