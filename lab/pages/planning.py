"""Computes what a model of a given size needs, without training it: the figures of docs/scale.md.

They come from the stages' own classes on PyTorch's meta device, whose tensors have shapes and types but no
memory. So parameters, FLOPs, caches and the memory of a step are those of the real code, for any size.
"""

import functools
import math
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lab import device, parallel, stages
from lab.training import cost, optim, presets

GPUS = (1, 8, 64)
UTILISATION = 0.4  # of the peak: what a well-tuned run reaches, not a guarantee
GPU_BYTES = 80e9  # of an H100, from NVIDIA's data sheet
USABLE = 0.9  # the rest is for fragmentation, CUDA itself and temporary tensors
CACHE_LENGTH = 32 * 1024  # tokens

# Fields of GPTConfig, by size and stage. The size of a mixture of experts counts only the parameters that a
# token uses. Shapes other than the defaults follow Llama 3 (heads of 128, few key/value heads, at 8 B an MLP
# of 3.5 times the width) and DeepSeek's first mixtures (64 experts, of which a token uses 6, and 2 shared
# ones; a latent of 512).
GPT2 = presets.PRESETS["gpt2"]["model"]
MIXTURE = {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2}
LATENT = {"kv_lora_rank": 512}
B1 = {"n_layer": 20, "n_head": 16, "n_embd": 2048, "block_size": 2048}
B8 = {"n_layer": 36, "n_head": 32, "n_embd": 4096, "block_size": 4096, "intermediate_size": 14336}
SIZES = {
    "124 M": dict.fromkeys(("0", "4", "5", "6", "7"), GPT2),
    "1 B": {
        "0": {"n_layer": 18, "n_head": 16, "n_embd": 2048, "block_size": 2048},
        "4": B1 | {"n_kv_head": 4},
        "5": B1 | {"n_kv_head": 4},
        "6": B1 | MIXTURE | {"n_kv_head": 4},
        "7": B1 | MIXTURE | LATENT,
    },
    "8 B": {
        "0": {"n_layer": 38, "n_head": 32, "n_embd": 4096, "block_size": 4096},
        "4": B8 | {"n_kv_head": 8},
        "5": B8 | {"n_kv_head": 8},
        "6": B8 | MIXTURE | {"n_kv_head": 8},
        "7": B8 | MIXTURE | LATENT,
    },
}


SHOWN = ("n_kv_head", "n_routed_experts", "num_experts_per_tok", "n_shared_experts")


def all_plans() -> dict[str, dict[str, dict]]:
    """The result of `plan` for every size and stage."""
    return {
        size: {number: plan(number, sizes) for number, sizes in by_stage.items()}
        for size, by_stage in SIZES.items()
    }


def plan(number: str, sizes: dict) -> dict:
    """What the stage's model needs with these sizes: memory in bytes, speeds in tokens/s."""
    model = bare(number, sizes)
    flops = cost.flops_per_token(model)
    speed = UTILISATION * device.PEAK_FLOPS["NVIDIA H100 80GB HBM3"] / flops
    state = {str(n_gpus): state_bytes(model, n_gpus) for n_gpus in GPUS}
    kept, copies = step_bytes(model)
    parallel.recompute_blocks(model)
    recomputed, _ = step_bytes(model)
    # What a GPU holds whatever the batch. Alone: the state, and the 16-bit copies of the weights that
    # autocast makes. DDP: the same, because the gradients are views of the buckets that it sends. FSDP: its
    # part, and what is whole at a time.
    fixed = {"1": state["1"] + copies}
    fixed["ddp"] = fixed["1"]
    fixed |= {f"fsdp {n_gpus}": state[str(n_gpus)] + whole_bytes(model) for n_gpus in GPUS[1:]}
    return {
        "config": sizes
        | {name: getattr(model.config, name) for name in SHOWN if hasattr(model.config, name)},
        "parameters": cost.parameters(model),
        "active_parameters": cost.active_parameters(model),
        "flops_per_token": flops,
        "state": state,
        "fixed": fixed,
        "sequence": {"kept": kept, "recomputed": recomputed},
        "fits": {how: [fitting(nbytes, kept), fitting(nbytes, recomputed)] for how, nbytes in fixed.items()},
        "tokens_per_second": {str(n_gpus): n_gpus * speed for n_gpus in GPUS},
        "cache": model.bfloat16().new_cache(1, CACHE_LENGTH).nbytes,
    }


def bare(number: str, sizes: dict) -> torch.nn.Module:
    """The stage's model on the meta device, in training mode."""
    stage = stages.load(stages.find(number))
    with torch.device("meta"):
        model = stage.GPT(stage.GPTConfig(**sizes))
    cost.group_experts(model)
    for layer in model.model.layers:  # one by one, so that recomputing a block uses the same precision
        layer.forward = functools.partial(under_autocast, layer.forward)
    return model


def under_autocast(forward: Callable, *inputs):
    with CudaAutocast():
        return forward(*inputs)


def state_bytes(model: torch.nn.Module, n_gpus: int) -> int:
    """Bytes of weights, gradients and AdamW's state per GPU if n_gpus divide them (FSDP2).

    FSDP2 divides the first dimension of each tensor and rounds up. For instance, of 64 GPUs with 8 experts, 8
    have one expert each; the largest part must fit.
    """
    part = sum(math.ceil(len(p) / n_gpus) * p[0].numel() for p in model.parameters())
    weight = next(model.parameters()).element_size()
    return part * (weight + weight + optimizer_bytes())  # a gradient has its weight's type


def optimizer_bytes() -> int:
    """Bytes per parameter in the state of our AdamW, counted on a real one after a step."""
    parameter = torch.nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = optim.adamw_of([parameter], 1e-3, 0.1, (0.9, 0.95))
    optimizer.step()
    return sum(kept.nbytes for kept in optimizer.state[parameter].values()) // parameter.numel()


def whole_bytes(model: torch.nn.Module) -> int:
    """Bytes of the tensors that FSDP2 gathers temporarily (lab.parallel.shard).

    In the backward pass, these are a block's weights in 16 bits, its gradients in 16 bits and, while they are
    sent, in 32 bits, and the next block's weights, which are prefetched. Tensors outside the blocks are whole
    from the forward pass to the end of the backward pass: weights, gradients, and the weights in 16 bits.
    """
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    return (2 + 2 + 4 + 2) * max(blocks) + (4 + 4 + 2) * (cost.parameters(model) - sum(blocks))


def step_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes that a forward and backward pass needs: per sequence, and independent of their number.

    The second number is mostly 16-bit copies of the weights. When memory peaks depends on the number of
    sequences, so the first number is measured with many. Together they are exact for one sequence and an
    upper bound otherwise, because the peak is a maximum of functions that are linear in that number.
    """
    one, some, many = (peak_bytes(model, batch_size, CudaAutocast()) for batch_size in (1, 8, 16))
    each = (many - some) // 8
    return each, one - each


def peak_bytes(model: torch.nn.Module, batch_size: int, autocast) -> int:
    """Peak bytes of all tensors in a forward and backward pass, except weights and gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    meta = model.lm_head.weight.device
    idx = torch.zeros(batch_size, model.config.block_size, dtype=torch.int64, device=meta)
    with LiveMemory() as memory:
        with autocast:
            _, losses = model(idx, targets=idx)
        sum(losses.values()).backward()
    return memory.peak


class LiveMemory(TorchDispatchMode):
    """Tracks the memory of tensors as operations create them and as they are deleted."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function: Callable, types, args=(), kwargs=None):
        known = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        made = function(*args, **(kwargs or {}))
        for tensor in tensors_in(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in known | self.alive:  # neither a view nor changed in place
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return made

    def forget(self, address: int, nbytes: int) -> None:
        self.alive.discard(address)
        self.now -= nbytes


def tensors_in(tree) -> list[torch.Tensor]:
    """All tensors in tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class CudaAutocast(TorchFunctionMode):
    """Does what torch.autocast("cuda", torch.bfloat16) does, on the meta device, which autocast lacks.

    Matrix products use bfloat16; softmax, norms and losses use float32; a weight is copied once. SDPA is
    FlashAttention, which keeps its inputs, its output and one number per row, but never the scores.
    """

    PRODUCTS = (F.linear, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul)
    EXACT = (F.softmax, F.layer_norm, F.cross_entropy)

    def __init__(self):
        super().__init__()
        self.copies = {}

    def __enter__(self):
        # With meta tensors, code that switches autocast off (such as a router) does so for the CPU.
        self.autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        self.autocast.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.autocast.__exit__(*error)

    def __torch_function__(self, function: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu"):
            if function is F.scaled_dot_product_attention:
                q, k, v = (self.cast(tensor) for tensor in args[:3])
                return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)[0]
            if function in self.PRODUCTS:
                args = [self.cast(arg) for arg in args]
            elif function in self.EXACT:
                args = [arg.float() if is_floating(arg) else arg for arg in args]
        return function(*args, **kwargs)

    def cast(self, value):
        if not is_floating(value):
            return value
        if not isinstance(value, torch.nn.Parameter):
            return value.bfloat16()
        if id(value) not in self.copies:
            self.copies[id(value)] = value.bfloat16()
        return self.copies[id(value)]


def is_floating(value) -> bool:
    """Whether the value is a floating-point tensor."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def fitting(fixed: int, each: int) -> int:
    """How many sequences of `each` bytes fit into a GPU, beside `fixed` bytes."""
    return max(0, int((USABLE * GPU_BYTES - fixed) // each))
