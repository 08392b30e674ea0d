"""Saves and loads a run's checkpoints. A kill or a full disk at any moment loses nothing.

A run has two: last/, to resume from, and best/, which has the lowest validation loss. Each has
model.safetensors: the weights under Hugging Face's names, with the step and the loss as metadata. last/ also
has state.pt: the optimizer, the random generators and the progress. With FSDP, the model and the optimizer in
last/ are in one file per process (see sharded.py), and the metadata is in metadata.json.
"""

import io
import json
import shlex
import shutil
from pathlib import Path

import safetensors
import torch
from safetensors import SafetensorError

from lab import atomic, formats, parallel
from lab.errors import UserError, shown
from lab.storage import sharded, tensors

WEIGHTS = "model.safetensors"
STATE = "state.pt"
METADATA = "metadata.json"


def save(
    run: Path,
    name: str,
    model: torch.nn.Module,
    metadata: dict[str, str],
    state: dict | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Writes the checkpoint run/name ("last" or "best"). If that fails, the previous one is kept.

    Every process must call this. If the model is sharded, each process writes its part of the model and the
    optimizer; otherwise the first process writes, and the optimizer's state goes into state.pt. Raises
    UserError if the disk is full.
    """
    folder, unfinished, old = run / name, run / f"{name}.tmp", run / f"{name}.old"
    in_parts = optimizer is not None and parallel.is_sharded(model)
    whole = {} if in_parts else whole_weights(model)
    if optimizer is not None and not in_parts:
        state = state | {"optimizer": optimizer.state_dict()}
    metadata = metadata | {"run_format": str(formats.RUN)}  # Hugging Face's "format" is "pt"
    try:
        if parallel.RANK == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
        if in_parts:
            parallel.from_first(lambda: None)  # waits until the folder exists
            sharded.save(unfinished, weights(model), model, optimizer)
        if parallel.RANK:
            return
        if in_parts:
            metadata["parts"] = str(len(list(unfinished.glob("*.safetensors"))))
            atomic.write_synced(unfinished / METADATA, json.dumps(metadata).encode())
        else:
            tensors.write(unfinished / WEIGHTS, whole, metadata)
        if state is not None:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            atomic.write_synced(unfinished / STATE, buffer.getbuffer())
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f"could not save step {metadata['step']} in {folder}: {error.strerror}\n"
            + (
                f"the previous checkpoint is intact; free some space, then: {resume_command(run)}"
                if exists(run)
                else "free some space and start again"
            )
        ) from None
    # A folder cannot be replaced atomically. Between these two renames `old` is the checkpoint: see `find`.
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors by name, without a tied head."""
    found = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # a quantized head has codes instead
    return {name: tensor.contiguous() for name, tensor in found.items()}


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's whole tensors, gathered in the first process if they are sharded; empty in the others."""
    whole = {}
    for name, tensor in weights(model).items():
        tensor = parallel.whole(tensor)  # by all processes, one tensor at a time
        if parallel.RANK == 0:
            whole[name] = tensor.cpu()
    return whole


def find(run: Path, name: str) -> Path | None:
    """The folder of the checkpoint run/name, or None if there is none."""
    for folder in (run / name, run / f"{name}.old"):
        if folder.exists():
            return folder
    return None


def exists(run: Path) -> bool:
    """Whether the run has a last checkpoint."""
    return find(run, "last") is not None


def written_at(run: Path) -> float:
    """When the last checkpoint was written, in seconds since the epoch."""
    return find(run, "last").stat().st_mtime


def step(run: Path) -> int:
    """The optimizer step of the last checkpoint."""
    return int(metadata(find(run, "last"))["step"])


def metadata(folder: Path) -> dict[str, str]:
    """The metadata saved with the weights: stage, step, val_loss."""
    path = folder / (METADATA if is_in_parts(folder) else WEIGHTS)
    try:
        if path.name == METADATA:
            found = json.loads(path.read_text())
        else:
            with safetensors.safe_open(path, "pt") as file:
                found = file.metadata() or {}
        number = int(found.get("run_format", 1))
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(path, error) from None
    formats.check({"format": number}, formats.RUN, shown(path))
    return found


def is_in_parts(folder: Path) -> bool:
    """Whether a checkpoint was written in parts, by several processes."""
    return (folder / METADATA).exists()


def load_weights(run: Path, name: str, model: torch.nn.Module) -> dict[str, str]:
    """Fills the model from the checkpoint run/name; returns its metadata.

    A model with memory keeps the dtype of its weights. One without (see tensors.WithoutMemory) gets the
    file's own tensors, memory-mapped and of the file's dtypes.
    """
    folder = find(run, name)
    if folder is None:
        raise UserError(f"{shown(run)} has no checkpoint {name!r}")
    saved = metadata(folder)
    if is_in_parts(folder):
        load_parts(run, model, None)
        return saved
    path = folder / WEIGHTS
    try:
        found = tensors.read(path)
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from None
    expected = weights(model)
    differing = [key for key in expected.keys() | found.keys() if shape(expected, key) != shape(found, key)]
    if differing:
        key = min(differing)
        raise UserError(
            f"{shown(path)} ({saved.get('stage', 'of an unknown stage')}) does not fit this model: {key} "
            f"is {shape(found, key)} in the file and {shape(expected, key)} in the model"
        )
    # A tied head is missing; the rest is checked above.
    if any(parameter.is_meta for parameter in model.parameters()):
        model.load_state_dict(found, strict=False, assign=True)
        if model.config.tie_word_embeddings and isinstance(model.lm_head, torch.nn.Linear):
            model.lm_head.weight = model.model.embed_tokens.weight
        return saved
    found = {name: parallel.my_part(tensor, expected[name]) for name, tensor in found.items()}
    model.load_state_dict(found, strict=False)
    return saved


def load_last(run: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Fills the model and the optimizer from the last checkpoint, sharded or not; returns its state.pt."""
    if is_in_parts(find(run, "last")):
        load_parts(run, model, optimizer)
        return load_state(run)
    load_weights(run, "last", model)
    state = load_state(run)
    saved = state["optimizer"]
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(sharded.divided(saved, optimizer) if parallel.is_sharded(model) else saved)
    except (KeyError, ValueError) as error:  # its parameter groups are not today's
        path = find(run, "last") / STATE
        raise UserError(
            f"the optimizer's state in {shown(path)} does not fit this model: {error}\n"
            f"start a new run from its weights with --init-from {shlex.quote(shown(run))}"
        ) from None
    for group, given in zip(optimizer.param_groups, options, strict=True):
        group.update(given)  # today's command line overrides the saved options
    return state


def load_parts(run: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Fills the model and the optimizer (unless None) from the last checkpoint of a run with FSDP."""
    folder = find(run, "last")
    parts, n_parts = sorted(folder.glob("*.safetensors")), metadata(folder)["parts"]
    if len(parts) != int(n_parts):
        raise damaged(folder, f"{len(parts)} of {n_parts} parts (*.safetensors) were found")
    for path in parts:
        try:
            safetensors.safe_open(path, "pt")  # checks the file's length against its header
        except (OSError, SafetensorError) as error:
            raise damaged(path, error) from None
    try:
        sharded.load(folder, weights(model), model, optimizer)
    except Exception as error:  # a wrong shape, for instance; torch raises many types
        raise damaged(folder, error) from None


def shape(tensors: dict[str, torch.Tensor], key: str) -> str:
    """The shape of a tensor as text, or "missing"."""
    return str(tuple(tensors[key].shape)) if key in tensors else "missing"


def load_state(run: Path) -> dict:
    """The state.pt of the last checkpoint, on the CPU: optimizer, random generators, progress."""
    path = find(run, "last") / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for broken files
        raise damaged(path, error) from None
    formats.check(state, formats.RUN, shown(path))
    if "rng" in state:  # early files of format 1, when a run had one process
        state["rngs"] = [state.pop("rng")]
    return state


def not_resumable(run: Path, missing: str) -> UserError:
    """The error for a last checkpoint whose state.pt lacks an entry that training needs."""
    path = find(run, "last") / STATE
    return UserError(
        f"{shown(path)} was written by older code, without {missing}: it cannot be resumed\n"
        f"start a new run from its weights with --init-from {shlex.quote(shown(run))}"
    )


def damaged(path: Path, error: Exception | str) -> UserError:
    """The error for a file that cannot be read."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{shown(path)} is damaged or incomplete: {reason}")


def resume_command(run: Path) -> str:
    """The command that resumes the run."""
    return f"{parallel.command()} train.py --resume --out {shlex.quote(shown(run))}"
