"""What a model of a given size will need, before anyone pays for it: the figures of docs/scale.md.

All are taken from the stages' own classes on PyTorch's meta device, whose tensors have shapes and types but
no memory: parameters, FLOPs, caches and the memory of a step are those of the code, whatever the size.
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
UTILISATION = 0.4  # of the peak: what a well-kept run reaches, not a promise
GPU_BYTES = 80e9  # of an H100, NVIDIA's data sheet
USABLE = 0.9  # the rest is for the allocator's gaps, CUDA itself and what a step needs in passing
CACHE_LENGTH = 32 * 1024  # tokens

# By size and stage: fields of GPTConfig. A mixture of experts is as large as the dense model by what a token
# uses. Where the defaults are not meant, the shapes are those of Llama 3 (heads of 128, few of keys and
# values, an MLP of 3.5 times the width at 8 B) and of DeepSeek's first mixtures (64 experts, 6 of them and 2
# shared ones a token; a latent of 512).
GPT2 = presets.PRESETS["gpt2"]["model"]
MIXTURE = {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2}
LATENT = {"kv_lora_rank": 512}
B1 = {"n_layer": 20, "n_head": 16, "n_embd": 2048, "block_size": 2048}
B8 = {"n_layer": 36, "n_head": 32, "n_embd": 4096, "block_size": 4096, "intermediate_size": 14336}
SIZES = {
    "124 M": dict.fromkeys((0, 4, 5, 6, 7), GPT2),
    "1 B": {
        0: {"n_layer": 18, "n_head": 16, "n_embd": 2048, "block_size": 2048},
        4: B1 | {"n_kv_head": 4},
        5: B1 | {"n_kv_head": 4},
        6: B1 | MIXTURE | {"n_kv_head": 4},
        7: B1 | MIXTURE | LATENT,
    },
    "8 B": {
        0: {"n_layer": 38, "n_head": 32, "n_embd": 4096, "block_size": 4096},
        4: B8 | {"n_kv_head": 8},
        5: B8 | {"n_kv_head": 8},
        6: B8 | MIXTURE | {"n_kv_head": 8},
        7: B8 | MIXTURE | LATENT,
    },
}


SHOWN = ("n_kv_head", "n_routed_experts", "num_experts_per_tok", "n_shared_experts")


def all_plans() -> dict[str, dict[str, dict]]:
    """By size and stage: what `plan` says."""
    return {
        size: {str(number): plan(number, sizes) for number, sizes in by_stage.items()}
        for size, by_stage in SIZES.items()
    }


def plan(number: int, sizes: dict) -> dict:
    """What a model of the stage with these sizes needs; memory in bytes, speeds in tokens a second."""
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


def bare(number: int, sizes: dict) -> torch.nn.Module:
    """The stage's model without memory, in training mode."""
    stage = stages.load(stages.names()[number])
    with torch.device("meta"):
        model = stage.GPT(stage.GPTConfig(**sizes))
    cost.group_experts(model)
    for layer in model.model.layers:  # for itself, so that the backward pass repeats it in the same precision
        layer.forward = functools.partial(under_autocast, layer.forward)
    return model


def under_autocast(forward: Callable, *inputs):
    with CudaAutocast():
        return forward(*inputs)


def state_bytes(model: torch.nn.Module, n_gpus: int) -> int:
    """Bytes of weights, gradients and AdamW's state on each of n_gpus that divide them (FSDP2).

    FSDP2 divides the first dimension of each tensor, rounding up: the experts of a mixture, say. Of 8 of them
    on 64 GPUs, 8 GPUs have one each, and the largest part is what must fit.
    """
    part = sum(math.ceil(len(p) / n_gpus) * p[0].numel() for p in model.parameters())
    weight = next(model.parameters()).element_size()
    return part * (weight + weight + optimizer_bytes())  # a gradient is like its weight


def optimizer_bytes() -> int:
    """Bytes that our AdamW keeps for a parameter, of a real one after a step."""
    parameter = torch.nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = optim.adamw_of([parameter], 1e-3, 0.1, (0.9, 0.95))
    optimizer.step()
    return sum(kept.nbytes for kept in optimizer.state[parameter].values()) // parameter.numel()


def whole_bytes(model: torch.nn.Module) -> int:
    """Bytes of what FSDP2 puts together in passing (lab.parallel.shard).

    Of a block the weights in 16 bits and, in the backward pass, the gradients in 16 and, as they are sent, in
    32 bits, with the weights of the next block, fetched meanwhile. What is outside of the blocks is whole
    from the forward to the end of the backward pass: weights, gradients, and the weights in 16 bits.
    """
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    return (2 + 2 + 4 + 2) * max(blocks) + (4 + 4 + 2) * (cost.parameters(model) - sum(blocks))


def step_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes that a forward and backward pass needs: for each sequence, and whatever their number.

    The second are mostly copies of the weights in 16 bits. Where the peak is depends on the number of
    sequences, so the first are those of many; both together are exact for one sequence, else at least as
    large as the peak, a largest of sums that are linear in the number.
    """
    one, some, many = (peak_bytes(model, batch_size, CudaAutocast()) for batch_size in (1, 8, 16))
    each = (many - some) // 8
    return each, one - each


def peak_bytes(model: torch.nn.Module, batch_size: int, autocast) -> int:
    """Bytes of all tensors at the peak of a forward and backward pass, but for weights and gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    where = model.lm_head.weight.device
    idx = torch.zeros(batch_size, model.config.block_size, dtype=torch.int64, device=where)
    with LiveMemory() as memory:
        with autocast:
            _, losses = model(idx, targets=idx)
        sum(losses.values()).backward()
    return memory.peak


class LiveMemory(TorchDispatchMode):
    """Adds up the memory of tensors as operations make them and as they are deleted."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function: Callable, types, args=(), kwargs=None):
        known = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))}
        made = function(*args, **(kwargs or {}))
        for tensor in tensors_in(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in known | self.alive:  # not a view, nor changed in place
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
    """What torch.autocast("cuda", torch.bfloat16) does, for the meta device, which autocast does not know.

    Matrix products take bfloat16, softmax, norms and losses float32; a weight is copied once. SDPA is
    FlashAttention, which keeps its inputs, its output and a number a row, never the scores.
    """

    PRODUCTS = (F.linear, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul)
    EXACT = (F.softmax, F.layer_norm, F.cross_entropy)

    def __init__(self):
        super().__init__()
        self.copies = {}

    def __enter__(self):
        # Regions that switch autocast off, as routers do, switch it off on this device for a meta tensor.
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
    """Whether it is a tensor of floating-point numbers."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def fitting(fixed: int, each: int) -> int:
    """Sequences that fit into a GPU beside what is there whatever their number."""
    return max(0, int((USABLE * GPU_BYTES - fixed) // each))
