"""Training with several processes: torchrun starts them, DDP or FSDP averages their gradients.

Each process computes its own rows of every batch. Without torchrun there is one process, and these functions
do nothing. torchrun handles failures: when one process dies, it stops the others.
"""

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lab.errors import UserError

Result = TypeVar("Result")

# Set by torchrun: the rank of this process, its rank on its machine, and the number of processes.
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def start(device: torch.device) -> torch.device:
    """Joins the processes that torchrun started; returns this process's device.

    From here on only the first process prints. Raises UserError if there are more processes than GPUs.
    """
    if WORLD_SIZE == 1:
        return device
    if device.type == "cuda":
        n_gpus = torch.cuda.device_count()
        if n_gpus <= LOCAL_RANK:
            raise UserError(
                f"process {LOCAL_RANK} on this machine has no GPU (GPUs found: {n_gpus})\n"
                f"use torchrun --nproc-per-node {n_gpus}"
            )
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"torchrun works on cuda and cpu, not on {device.type}: use --device cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    keep(dist.group.WORLD)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


@functools.cache
def patient_group() -> dist.ProcessGroup:
    """A group of the same processes for the CPU, with a timeout long enough for preparing data."""
    return keep(dist.new_group(backend="gloo", timeout=timedelta(days=2)))


def keep(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Returns the group, and keeps Python from ever deleting it.

    Deleting a gloo group holds the GIL while it waits for gloo's threads. One of them may be waiting for the
    GIL to release its last tensor: then the process would never end.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    return group


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
        patient_group.cache_clear()


def in_turn(function: Callable[[], Result]) -> Result:
    """Calls function in the first process, then in one process per machine, then in the rest.

    So data is prepared once per machine, or only once if the machines share a disk. Returns the result.
    """
    if WORLD_SIZE == 1:
        return function()
    if RANK == 0:
        mine = 0
    elif LOCAL_RANK == 0:
        mine = 1
    else:
        mine = 2
    for turn in range(3):
        if turn == mine:
            result = function()
        dist.barrier(patient_group())
    return result


def from_first(function: Callable[[], Result]) -> Result:
    """Calls function in the first process only; returns its result in every process."""
    if WORLD_SIZE == 1:
        return function()
    result = [function() if RANK == 0 else None]
    dist.broadcast_object_list(result, src=0)
    return result[0]


def largest(number: int | None) -> int | None:
    """The largest of the processes' numbers above 0, or None if there is none. Does not wait for a GPU."""
    if WORLD_SIZE == 1:
        return number
    found = torch.tensor(0 if number is None else number)  # a tensor holds no None
    dist.all_reduce(found, dist.ReduceOp.MAX, patient_group())
    return found.item() if found > 0 else None


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def of_all(value: Result) -> list[Result]:
    """Every process's value, by rank."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def command() -> str:
    """The command that starts a script with as many processes as there are now."""
    if WORLD_SIZE == 1:
        return "python"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))
    several = f"--nnodes {WORLD_SIZE // local} … " if local < WORLD_SIZE else ""
    return f"torchrun {several}--nproc-per-node {local}"


def micro_batch(batch_size: int, micro_batch_size: int | None) -> int:
    """Sequences that a process computes at once. Raises UserError if the batch cannot be divided evenly."""
    if micro_batch_size is None:
        size, smallest, given = batch_size // WORLD_SIZE, WORLD_SIZE, ""
    else:
        size, smallest = micro_batch_size, micro_batch_size * WORLD_SIZE
        given = f" with --micro-batch-size {micro_batch_size}"
    if batch_size < smallest or batch_size % (size * WORLD_SIZE):
        raise UserError(
            f"--batch-size {batch_size} cannot be divided among {WORLD_SIZE} processes{given}\n"
            f"use a multiple of {smallest}"
        )
    return size


def my_rows(batch_size: int, micro_batch: int) -> np.ndarray:
    """The rows of a batch that this process computes, one micro-batch after another.

    The n-th micro-batches of all processes are adjacent. Together they equal the n-th micro-batch of a single
    process with a micro-batch of their total size, so a loss over all of it (the balance loss) is the same.
    """
    return np.arange(batch_size).reshape(-1, WORLD_SIZE, micro_batch)[:, RANK].ravel()


def my_seed(seed: int) -> int:
    """A seed for this process alone. (Adding rank · 2³² would not do: the CPU's generator uses 32 bits.)"""
    return int(np.random.SeedSequence((seed, RANK)).generate_state(1)[0])


def join(model: torch.nn.Module, how: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model to train with, which averages gradients over the processes. how: ddp or fsdp."""
    if WORLD_SIZE == 1:
        return model
    if how == "fsdp":
        shard(model, dtype)
        return model
    # The buffers (a router's counts and bias) are already equal: the model sums the counts itself.
    # As views of the communication buckets, gradients are not stored twice: 4 bytes less per parameter.
    return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)


def shard(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """FSDP2: each process keeps its part of every tensor; a block is gathered only while it is computed.

    The matrices of the blocks are communicated in dtype. The embedding and the head stay in float32, as under
    autocast, so that the residual stream does too. Routers stay in float32 because rounding could send a
    token to another expert.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (WORLD_SIZE,))
    float32_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    block_policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            fully_shard(layer.mlp.gate, mesh=mesh, mp_policy=float32_policy)
        fully_shard(layer, mesh=mesh, mp_policy=block_policy)
    fully_shard(model, mesh=mesh, mp_policy=float32_policy)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether each process holds only a part of the model."""
    return hasattr(model, "set_requires_gradient_sync")  # FSDP adds this method


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered if the processes hold it in parts; every process must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def my_part(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, divided as `like` is; all of it if `like` is not in parts."""
    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:  # the step count has another shape
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def synchronize_gradients(model: torch.nn.Module, wanted: bool) -> None:
    """Sets whether the next backward pass averages over the processes; call it before the forward pass."""
    model = getattr(model, "_orig_mod", model)  # unwraps a compiled model
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = wanted
    elif is_sharded(model):
        model.set_requires_gradient_sync(wanted)


def recompute_blocks(model: torch.nn.Module) -> None:
    """Activation checkpointing: the backward pass keeps only the inputs of blocks and recomputes the rest
    (Chen et al. 2016, arXiv 1604.06174)."""
    for layer in model.model.layers:
        options = {"use_reentrant": False}
        if hasattr(layer.mlp, "gate"):
            options["context_fn"] = functools.partial(only_once, layer.mlp.gate)
        layer.forward = functools.partial(recomputed, layer.forward, options)


def recomputed(forward: Callable, options: dict, *inputs):
    """Returns forward(*inputs); its activations are recomputed in the backward pass."""
    return checkpoint(forward, *inputs, **options) if torch.is_grad_enabled() else forward(*inputs)


def only_once(router: torch.nn.Module) -> tuple:
    """Contexts for a block's forward pass and its repetition, which must not count tokens again."""

    @contextlib.contextmanager
    def uncounted():
        before = router.tokens_per_expert.clone(), router.entropy.clone()
        try:
            yield
        finally:  # it ends in an exception as soon as all is there that the backward pass needs
            for statistic, value in zip((router.tokens_per_expert, router.entropy), before, strict=True):
                statistic.copy_(value)
            router.balance_loss = None

    return contextlib.nullcontext(), uncounted()
