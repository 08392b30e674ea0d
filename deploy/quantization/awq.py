"""AWQ: scales the input channels that matter before rounding, and undoes it in the operation before.

Paper: Lin et al. 2023, arXiv 2306.00978. W x = (W s)(x / s) for any scales s, one for each input channel. A
large s makes a channel's relative rounding error small, and 1/s costs nothing: it is folded into the weights
of the norm that makes x (section 3.2). `fold_layer` does that to a whole layer, and changes none of its
outputs. Then `clip` chooses how much of each group's range the grid covers, and rounds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from deploy.quantization.grid import Quantized, by_column, dequantize, find_grid, in_groups, to_codes
from deploy.quantization.rtn import rtn
from lab.errors import UserError

N_ALPHA = 20  # α = 0, 0.05 … 0.95
N_CLIP = 10  # limits of 1, 0.95 … 0.55 times a group's largest weight
SEARCH_TOKENS = 2048  # each α is tried on no more tokens than this


@dataclass
class Fold:
    """Scales of an input: which weights are divided by them, and which are multiplied."""

    sources: list[nn.Module]
    """Modules whose outputs, joined, are the input: norms, or a linear layer."""
    readers: list[tuple[nn.Module, str]]
    """Every weight (…, in) that reads the input: its module and its name there."""
    inspected: str
    """The module whose output should change least; its first argument is the input."""


def folds(layer: nn.Module) -> Iterator[Fold]:
    """The places in a layer where scales can be folded. Modules have the names of the course's stages."""
    parts = dict(layer.named_modules())

    def readers(*names: str) -> list[tuple[nn.Module, str]]:
        return [(parts[name], "weight") for name in names if name in parts]

    if "eh_proj" in parts:  # the MTP block reads an embedding and a hidden state, each with its norm
        yield Fold([parts["enorm"], parts["hnorm"]], readers("eh_proj"), "eh_proj")
    first = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "q_a")] + ["self_attn.kv_a_proj_with_mqa"]
    yield Fold([parts["input_layernorm"]], readers(*first), "self_attn")
    for latent in ("q", "kv"):  # the latents of MLA
        if f"self_attn.{latent}_b_proj" in parts:
            name = f"self_attn.{latent}_b_proj"
            yield Fold([parts[f"self_attn.{latent}_a_layernorm"]], readers(name), name)
    v, o = parts.get("self_attn.v_proj"), parts["self_attn.o_proj"]
    if v is not None and v.out_features == o.in_features:  # else several heads share a row of v
        yield Fold([v], readers("self_attn.o_proj"), "self_attn.o_proj")
    in_mlp = readers("mlp.gate_proj", "mlp.up_proj", "mlp.gate")  # mlp.gate is the router
    in_mlp += readers("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
    if "mlp.experts" in parts:
        in_mlp.append((parts["mlp.experts"], "gate_up_proj"))
    yield Fold([parts["post_attention_layernorm"]], in_mlp, "mlp")
    for mlp in ("mlp", "mlp.shared_experts"):
        if f"{mlp}.gate_proj" in parts:  # in SwiGLU, up is a factor: dividing it divides the product
            yield Fold([parts[f"{mlp}.up_proj"]], readers(f"{mlp}.down_proj"), f"{mlp}.down_proj")


def fold_layer(
    layer: nn.Module, args: tuple, bits: int, group_size: int | None, dtype: torch.dtype
) -> dict[str, float]:
    """Folds the best scales into a layer's weights, given its arguments. Its outputs stay the same.

    dtype is that in which the norms are stored. Returns each fold's α by the name of the inspected module.
    Raises UserError if the layer is not built like the course's.
    """
    try:
        all_folds = list(folds(layer))
    except KeyError as missing:
        raise UserError(f"awq needs layers with an {missing}, as in the course: use --method gptq") from None
    windows = max(1, SEARCH_TOKENS // args[0].size(1))
    some = first_windows(args, windows)
    before = layer(*some)
    seen = see_inputs(layer, {fold.inspected for fold in all_folds} | {"mlp.experts"}, args, windows)
    alphas = {}
    for fold in all_folds:
        mean, inputs = seen[fold.inspected]
        output = partial(layer.get_submodule(fold.inspected), *inputs)
        rounded = [reader for reader in fold.readers if is_quantized(*reader)]
        scales, alpha = best_scales(mean, rounded, output, bits, group_size)
        apply(fold, scales, dtype)
        alphas[fold.inspected] = alpha
    if "mlp.experts" in seen:
        _, inputs = seen["mlp.experts"]
        alphas["mlp.experts"] = fold_experts(layer.mlp.experts, *inputs, bits, group_size)
    if (layer(*some) - before).norm() > 0.01 * before.norm():
        raise UserError(
            "awq cannot scale this model: something else reads a norm's output, too\nuse --method gptq"
        )
    return alphas


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether a weight will be quantized: a router's is not."""
    return isinstance(module, nn.Linear) or name == "gate_up_proj"


def see_inputs(
    layer: nn.Module, names: set[str], args: tuple, windows: int
) -> dict[str, tuple[torch.Tensor, tuple]]:
    """Runs the layer. For each module named: the mean |x| of its input's channels, and its arguments.

    The arguments are those of the first windows only.
    """
    seen, handles = {}, []
    for name, module in layer.named_modules():
        if name in names:

            def see(module, inputs, name=name):
                mean = inputs[0].float().abs().flatten(0, -2).mean(0)
                if name == "mlp.experts":  # x, weights and indices, each (tokens, …)
                    seen[name] = (mean, tuple(t[: windows * args[0].size(1)] for t in inputs))
                else:
                    seen[name] = (mean, first_windows(inputs, windows))

            handles.append(module.register_forward_pre_hook(see))
    layer(*args)
    for handle in handles:
        handle.remove()
    return seen


def first_windows(args: tuple, n: int) -> tuple:
    """The arguments of a module for the first n windows only. A mask has two dimensions and is for all."""
    return tuple(arg[:n] if torch.is_tensor(arg) and arg.dim() > 2 else arg for arg in args)


def best_scales(
    mean: torch.Tensor,
    readers: list[tuple[nn.Module, str]],
    output: Callable[[], torch.Tensor],
    bits: int,
    group_size: int | None,
) -> tuple[torch.Tensor, float]:
    """The scales s = mean|x|^α for the α whose rounding changes the output least; and that α.

    output() computes the inspected module's output with the readers' present weights.
    """
    weights = [getattr(module, name).data for module, name in readers]
    wanted = output()
    best_loss, best = float("inf"), None
    for step in range(N_ALPHA):
        alpha = step / N_ALPHA
        scales = mean.pow(alpha).clamp(min=1e-4)  # a channel that is always 0 has no scale
        scales = scales / (scales.max() * scales.min()).sqrt()
        for (module, name), weight in zip(readers, weights, strict=True):
            getattr(module, name).data = round_to_nearest(weight * scales, bits, group_size) / scales
        loss = (output() - wanted).square().mean().item()
        if loss < best_loss:
            best_loss, best = loss, (scales, alpha)
    for (module, name), weight in zip(readers, weights, strict=True):
        getattr(module, name).data = weight
    return best


def round_to_nearest(weight: torch.Tensor, bits: int, group_size: int | None) -> torch.Tensor:
    """A weight (…, out, in), such as that of stacked experts, with every row rounded on its grid."""
    return dequantize(rtn(weight.flatten(0, -2), bits, group_size)).view_as(weight)


def apply(fold: Fold, scales: torch.Tensor, dtype: torch.dtype) -> None:
    """Divides the sources' outputs by the scales, and multiplies all weights that read them."""
    parts = scales.split([source.weight.size(0) for source in fold.sources])
    scales = torch.cat([divide(source, s, dtype) for source, s in zip(fold.sources, parts, strict=True)])
    for module, name in fold.readers:
        parameter = getattr(module, name)
        parameter.data = parameter.data * scales


def divide(source: nn.Module, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Divides the outputs of a norm or a linear layer by the scales; returns the scales really used.

    A norm's weights are not quantized, so they are stored in dtype. With scales that give numbers of that
    format, the readers' factors undo exactly what was divided.
    """
    before = source.weight.data
    if isinstance(source, nn.Linear):
        source.weight.data = before / scales[:, None]
    else:
        after = (before / scales).to(dtype).float()
        usable = after.isfinite() & (after != 0)  # a weight of 0 stays 0, whatever divides it
        source.weight.data = torch.where(usable, after, before)
        scales = torch.where(usable, before / after, 1)
    if getattr(source, "bias", None) is not None:
        source.bias.data = source.bias.data / scales
    return scales


def fold_experts(
    experts: nn.Module,
    x: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    bits: int,
    group_size: int | None,
) -> float:
    """Folds up → down of every routed expert, with scales from its own tokens. Returns the mean α."""
    alphas = []
    gate_up, down = experts.gate_up_proj.data.clone(), experts.down_proj.data.clone()
    for e in range(len(down)):
        tokens = x[(indices == e).any(-1)]
        if not len(tokens):
            continue
        gate, up = (tokens @ gate_up[e].T).chunk(2, dim=-1)
        hidden = F.silu(gate) * up
        reader = nn.Linear(down.size(2), down.size(1), bias=False, device=down.device)
        reader.weight.data = down[e]
        mean = hidden.abs().mean(0)
        scales, alpha = best_scales(mean, [(reader, "weight")], partial(reader, hidden), bits, group_size)
        gate_up[e, len(scales) :] /= scales[:, None]  # up is below gate
        down[e] *= scales
        alphas.append(alpha)
    experts.gate_up_proj.data, experts.down_proj.data = gate_up, down
    return sum(alphas) / max(1, len(alphas))


def clip(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group_size: int | None) -> Quantized:
    """Rounds a weight (out, in) to nearest, with the best range for each row and group.

    Clipping the largest weights of a group to a smaller one makes the grid of all others finer. Of N_CLIP
    limits, each group gets the one that changes its part of the output least, on inputs with this Hessian
    (in, in).
    """
    largest = in_groups(weight, group_size).abs().amax(-1)  # (out, groups)
    best = best_loss = None
    for step in range(N_CLIP):
        limit = by_column(largest * (1 - step / 20), weight.size(1), group_size)
        scale, zero = find_grid(weight.clamp(-limit, limit), bits, group_size)
        q = Quantized(to_codes(weight, scale, zero, bits, group_size), scale, zero, bits, group_size)
        loss = group_losses(weight - dequantize(q), hessian, group_size)
        if best is None:
            best, best_loss = (scale, zero), loss
            continue
        better = loss < best_loss
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        best_loss = torch.where(better, loss, best_loss)
    return Quantized(to_codes(weight, *best, bits, group_size), *best, bits, group_size)


def group_losses(change: torch.Tensor, hessian: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """For each row and group (out, groups): the square of what a change of its weights adds to the output."""
    losses, width = [], group_size or change.size(1)
    for start in range(0, change.size(1), width):
        part, columns = change[:, start : start + width], slice(start, start + width)
        losses.append(((part @ hessian[columns, columns]) * part).sum(1))
    return torch.stack(losses, dim=1)


def may_clip(name: str) -> bool:
    """Whether a projection may be clipped: not those to queries and keys, whose product is what counts."""
    return not name.rsplit(".", 1)[-1].startswith(("q_", "k_", "kv_"))
