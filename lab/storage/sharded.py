"""Checkpoints of a sharded model (FSDP): each process writes its part; any number of processes can read them.

torch.distributed.checkpoint writes them as safetensors, one file per process. Weights have their usual names;
the optimizer's state of a weight is stored as optimizer.<name>.<key>. A single process can read them too, so
the last checkpoint of a sharded run can be loaded like that of any other run.
"""

import contextlib
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from lab import parallel


def save(folder: Path, weights: dict, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes this process's part into folder; every process must call this. weights: the model's, by name."""
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with plain_errors():
        dcp.save(weights | optimizer_state(model, optimizer), storage_writer=writer)


def load(
    folder: Path, weights: dict, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> None:
    """Fills the model, sharded or not, and the optimizer (unless None) from the parts in folder."""
    import torch.distributed.checkpoint as dcp

    tensors = dict(weights)
    if optimizer is not None:
        make_state(optimizer)
        tensors |= optimizer_state(model, optimizer)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings(), plain_errors():
        warnings.simplefilter("ignore")  # "assuming the intent is to load in a single process"
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


@contextlib.contextmanager
def plain_errors():
    """Raises the error of one process itself: torch wraps it in a class that is not even an Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as wrapped:
        error, _ = next(iter(wrapped.failures.values()))
        raise error from None


def divided(whole: dict, optimizer: torch.optim.Optimizer) -> dict:
    """The part of an optimizer's whole state_dict that this process holds."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    mine = {
        number: {what: parallel.my_part(value, parameters[number]) for what, value in state.items()}
        for number, state in whole["state"].items()
    }
    return whole | {"state": mine}


def optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state tensors by name (not copies of them)."""
    return {
        f"optimizer.{name}.{what}": value
        for name, parameter in model.named_parameters()
        for what, value in optimizer.state[parameter].items()
    }


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Makes an optimizer that has not stepped yet create its state, without changing any weight."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
