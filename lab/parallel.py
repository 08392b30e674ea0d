"""Several processes as one: torchrun starts them, DDP or FSDP joins their gradients.

Each process computes its own rows of every batch. Without torchrun there is one process, and nothing here
does anything. Errors and the ends of processes are torchrun's business: when one dies it stops the others.
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

# torchrun's numbers: of this process, of this process on its machine, and how many there are.
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def start(device: torch.device) -> torch.device:
    """Joins the processes that torchrun started; returns the device of this one.

    Only the first prints from here on. UserError where there are more processes than GPUs.
    """
    if WORLD_SIZE == 1:
        return device
    if device.type == "cuda":
        there = torch.cuda.device_count()
        if there <= LOCAL_RANK:
            raise UserError(
                f"process {LOCAL_RANK} of this machine has no GPU: there are {there}\n"
                f"use torchrun --nproc-per-node {there}"
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
    """The same processes, who on the CPU wait for each other as long as preparing data may take."""
    return keep(dist.new_group(backend="gloo", timeout=timedelta(days=2)))


def keep(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group, which Python will never delete.

    Deleting one of gloo's holds Python's lock and waits for its threads, of which one may be waiting for that
    lock, to let go of the last tensor: the process would not end.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    return group


def stop() -> None:
    """Leaves the group."""
    if dist.is_initialized():
        dist.destroy_process_group()
        patient_group.cache_clear()


def in_turn(function: Callable[[], Result]) -> Result:
    """What function returns, called by the first process, then by one a machine, then by the rest.

    So what it prepares is prepared once a machine, or once where the machines share a disk.
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
    """What function returns in the first process, which alone calls it."""
    if WORLD_SIZE == 1:
        return function()
    result = [function() if RANK == 0 else None]
    dist.broadcast_object_list(result, src=0)
    return result[0]


def largest(number: int | None) -> int | None:
    """The largest of the processes' numbers above 0, None where none has one. Waits for no GPU."""
    if WORLD_SIZE == 1:
        return number
    found = torch.tensor(0 if number is None else number)  # a tensor holds no None
    dist.all_reduce(found, dist.ReduceOp.MAX, patient_group())
    return found.item() if found > 0 else None


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def of_all(thing: Result) -> list[Result]:
    """Every process's thing, by rank."""
    things = [thing] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(things, thing)
    return things


def command() -> str:
    """What starts a driver with as many processes as there are now."""
    if WORLD_SIZE == 1:
        return "python"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))
    several = f"--nnodes {WORLD_SIZE // local} … " if local < WORLD_SIZE else ""
    return f"torchrun {several}--nproc-per-node {local}"


def micro_batch(batch_size: int, micro_batch_size: int | None) -> int:
    """Sequences that a process computes at once. UserError where the batch cannot be divided so."""
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
    """The rows of a batch that are this process's, micro-batch after micro-batch.

    The processes' n-th micro-batches are neighbours: together they are the n-th of a single process whose
    micro-batch is as large as theirs together. So a loss that looks at all of it (that of balance) agrees.
    """
    return np.arange(batch_size).reshape(-1, WORLD_SIZE, micro_batch)[:, RANK].ravel()


def my_seed(seed: int) -> int:
    """A seed for this process alone. (The CPU's generator takes 32 bits; adding rank · 2³² changes none.)"""
    return int(np.random.SeedSequence((seed, RANK)).generate_state(1)[0])


def join(model: torch.nn.Module, how: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model to train with: its gradients become the mean over the processes. how: ddp or fsdp."""
    if WORLD_SIZE == 1:
        return model
    if how == "fsdp":
        shard(model, dtype)
        return model
    # The buffers, a router's counts and bias, are the same everywhere: the model sums the counts itself.
    # Gradients that are views of what is sent are not held twice: 4 bytes a parameter less.
    return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)


def shard(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """FSDP2: each process keeps its part of every tensor, and a block is whole only while it is computed.

    Matrices of the blocks travel in dtype. Embedding and head stay in float32, as autocast leaves them, so
    that the residual stream does; routers, because rounding could send a token to another expert.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (WORLD_SIZE,))
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    travelling = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            fully_shard(layer.mlp.gate, mesh=mesh, mp_policy=exact)
        fully_shard(layer, mesh=mesh, mp_policy=travelling)
    fully_shard(model, mesh=mesh, mp_policy=exact)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether each process holds only a part of the model."""
    return hasattr(model, "set_requires_gradient_sync")  # FSDP gives it to what it shards


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that the processes hold in parts; all of them must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def my_part(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor what this process holds of like, which may be in parts; all of it otherwise."""
    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:  # such as a count of steps
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def synchronize_gradients(model: torch.nn.Module, wanted: bool) -> None:
    """Whether the next pass ends in a mean over the processes; call it before the forward."""
    model = getattr(model, "_orig_mod", model)  # a compiled one
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = wanted
    elif is_sharded(model):
        model.set_requires_gradient_sync(wanted)


def recompute_blocks(model: torch.nn.Module) -> None:
    """Activation checkpointing: only the inputs of blocks are kept for the backward pass, which computes the
    rest once more (Chen et al. 2016, arXiv 1604.06174)."""
    for layer in model.model.layers:
        options = {"use_reentrant": False}
        if hasattr(layer.mlp, "gate"):
            options["context_fn"] = functools.partial(only_once, layer.mlp.gate)
        layer.forward = functools.partial(recomputed, layer.forward, options)


def recomputed(forward: Callable, options: dict, *inputs):
    """forward(*inputs), with its activations computed again in the backward pass."""
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
