"""Imports a Hugging Face folder as a run: python -m deploy.import_hf DIR --out runs/NAME

GPT-2 becomes stage 0. Llama becomes stage 5 (the same function as stages 3 and 4, but faster); with scaled
positions, or heads of another width, llama3 (in family/). So does Mistral, but with a sliding window, or
heads of another width, it becomes mistral. Qwen2, Qwen3, Qwen3-MoE and GPT-NeoX (such as Pythia) become
qwen2, qwen3, qwen3_moe and gpt_neox. Mixtral becomes stage 6. DeepSeek-V2 becomes deepseek_v2. DeepSeek-V3,
and so Moonlight and Kimi-K2, becomes stage 7 or, with YaRN, groups of experts or a latent for the queries,
deepseek_v3 (in family/). sample.py, train.py --init-from and deploy/export.py take the run. DIR must be on
this machine: nothing is downloaded. Weights keep their number format, unless --dtype names another one.
Anything that no stage can represent is refused, with its name. The run keeps the tokenizer's files, its chat
template and generation_config.json: sample.py stops at the end-of-text tokens in them and, with --chat, holds
a conversation; deploy/export.py gives them back.
"""

import sys
from pathlib import Path

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # first, because importing torch takes seconds

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import tyro
from safetensors import SafetensorError, safe_open

from data import from_meta
from data.tokenizers import HF_CONFIG, copy_side_files
from deploy import (
    architectures,
    deepseek,
    deepseek_v2,
    fields,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    mixtral,
    qwen,
    qwen_moe,
    tokenizer_json,
)
from deploy.output import new_folder
from lab import cli, device, formats, stages
from lab.errors import UserError, shown
from lab.storage import checkpoint, edits, runs, tensors
from lab.training import cost

COUNTERPARTS = {"gpt2": gpt2, "llama": llama, "mistral": mistral, "qwen2": qwen, "qwen3": qwen}
COUNTERPARTS |= {"mixtral": mixtral, "gpt_neox": gpt_neox, "qwen3_moe": qwen_moe}
COUNTERPARTS |= {"deepseek_v2": deepseek_v2}
COUNTERPARTS |= {"deepseek_v3": deepseek, "kimi_k2": deepseek}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PICKLED = ("pytorch_model*.bin*", "*.pt", "*.pth", "*.ckpt")


@dataclass
class Settings:
    """Imports a Hugging Face folder as a run."""

    folder: tyro.conf.Positional[str]
    """Folder with config.json, model.safetensors and tokenizer.json."""
    out: str
    """Folder of the run to create."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the run's weights; auto: that of most weights in the folder."""


@device.memory_errors(
    "import needs about the memory of the weights, or twice that for a mixture of experts: close other "
    "programs, or use a larger machine"
)
def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    source, out = Path(settings.folder), Path(settings.out)
    config = read_config(source)
    files = tensor_files(source)
    dtype = None if settings.dtype == "auto" else settings.dtype
    stage = import_model(config, list(files), reader(files), source, out, source, dtype)
    counted = f"{runs.read_config(out)['parameters']:,} parameters"
    print(f"imported {shown(source)} as {stage} with {counted} to {shown(out)}")
    print(f"to use it: python sample.py --run {shlex.quote(shown(out))}")


def import_model(
    config: dict,
    names: list[str],
    tensor: Callable[[str], torch.Tensor],
    side: Path,
    out: Path,
    source: Path,
    dtype: str | None,
) -> str:
    """Writes a run at `out` from a model in the format of Hugging Face; returns the name of its stage.

    config is its config.json, names are those of its tensors, and tensor(name) reads one. side is a folder
    with its config.json, its tokenizer's files and generation_config.json. source is what the user named, for
    messages. dtype is that of the run's weights; None: that of most weights. Raises UserError for anything
    that no stage can represent.
    """
    counterpart = counterpart_of(config, side)
    stage, sizes = counterpart.from_config(config)
    if counterpart is deepseek:
        sizes = deepseek.fit_to_tensors(sizes, names)
    layout = {"rope_interleave": sizes.pop("rope_interleave")} if "rope_interleave" in sizes else {}
    model = empty_model(stage, sizes)
    architectures.warn_if_edited(stage)
    sizes = asdict(model.config)
    meta = {"name": source.resolve().name} | tokenizer_json.read(side)
    tokenizer = from_meta(meta, side)
    if tokenizer.vocab_size > sizes["vocab_size"]:
        raise UserError(
            f"{shown(source)}: tokenizer.json has {tokenizer.vocab_size:,} tokens, with those added by other "
            f"files, but config.json has vocab_size {sizes['vocab_size']:,}"
        )
    tokenizer_json.say_what_is_ignored(side)
    with new_folder(out, source) as run:
        weights, chosen = read_weights(source, names, tensor, counterpart, model, sizes | layout, dtype)
        dtypes = dtypes_of(weights, model, chosen, None if dtype else f"{chosen}, as most weights are")
        write_weights(run, stage, weights, dtypes)
        copy_side_files(side, run)
        shutil.copyfile(side / "config.json", run / HF_CONFIG)
        meta |= {"vocab_size": tokenizer.vocab_size}
        runs.write_json(run / "meta.json", meta)
        runs.write_json(run / "config.json", describe(source, stage, model, meta, chosen))
    return stage


def read_config(folder: Path) -> dict:
    """Reads config.json. Raises UserError if it is missing or damaged."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {shown(path)}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{shown(path)} is damaged: {error}") from None
    counterpart_of(config, folder)  # says that the model is not supported before the weights are opened
    return config


def counterpart_of(config: dict, side: Path):
    """The module that converts this model. Raises UserError if its model_type is not supported."""
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in COUNTERPARTS:
        obstacles = fields.obstacles(config) if isinstance(config, dict) else ""
        raise UserError(
            f"{shown(side / 'config.json')} has model_type {kind!r}{obstacles and f' with {obstacles}'}: no "
            f"stage can represent that\nsupported are the model_types {', '.join(COUNTERPARTS)}"
        )
    return COUNTERPARTS[kind]


def empty_model(stage: str, sizes: dict) -> torch.nn.Module:
    """The stage's model on the meta device: shapes without data. Raises UserError for impossible sizes."""
    module = stages.load(stage)
    try:
        with torch.device("meta"):
            return module.GPT(module.GPTConfig(**sizes))
    except ValueError as error:
        raise UserError(f"config.json does not fit {stage}: {error}") from None


def read_weights(
    source: Path,
    names: list[str],
    tensor: Callable[[str], torch.Tensor],
    counterpart,
    model: torch.nn.Module,
    sizes: dict,
    dtype: str | None,
) -> tuple[dict[str, torch.Tensor], str]:
    """Our tensors as they are stored, and the dtype to convert them to: `dtype`, or that of most numbers.

    Raises UserError that names the tensor, as the file does, if one is missing, unexpected, has the wrong
    shape or dtype, or numbers that are not finite in the dtype.
    """
    theirs = {name: tensor(name) for name in names}
    dtype = dtype or most_common_dtype(theirs)
    for name, numbers in theirs.items():
        if numbers.dtype in DTYPES and not re.search(counterpart.BUFFERS, name):
            check_finite(source, name, numbers, dtype)
    theirs = counterpart.full_names(theirs)
    buffers = sorted(name for name in theirs if re.search(counterpart.BUFFERS, name))
    if buffers:
        print(f"ignored tensors that are not weights: {', '.join(buffers)}", file=sys.stderr)
    theirs = {name: tensor for name, tensor in theirs.items() if name not in buffers}
    expected = counterpart.to_tensors(checkpoint.weights(model), sizes)
    head_name = gpt_neox.HEAD if counterpart is gpt_neox else "lm_head.weight"
    if head_name in theirs.keys() - expected.keys():  # a tied matrix, saved as the head or twice
        head = theirs.pop(head_name)
        theirs.setdefault(counterpart.EMBEDDING, head)
        if not torch.equal(head, theirs[counterpart.EMBEDDING]):
            raise UserError(
                f"{shown(source)}: {head_name} differs from {counterpart.EMBEDDING}, but config.json has "
                "tie_word_embeddings = true: set it to false if the head has weights of its own"
            )
    for name in sorted(expected.keys() | theirs.keys()):
        shape, required = checkpoint.shape(theirs, name), checkpoint.shape(expected, name)
        if required == "missing":
            raise UserError(f"{shown(source)} has an unexpected tensor, {name} of shape {shape}")
        if shape != required:
            raise UserError(f"{shown(source)}: {name} is {shape}, but config.json requires {required}")
        if theirs[name].dtype not in DTYPES:
            raise UserError(
                f"{shown(source)}: {name} has dtype {str(theirs[name].dtype).removeprefix('torch.')}; "
                "supported are float32, float16 and bfloat16"
            )
    return counterpart.from_tensors(theirs, sizes), dtype


def most_common_dtype(tensors: dict[str, torch.Tensor]) -> str:
    """The dtype of most numbers, of those that a run can have."""
    counts = dict.fromkeys(DTYPES, 0)
    for tensor in tensors.values():
        if tensor.dtype in counts:
            counts[tensor.dtype] += tensor.numel()
    return named(max(counts, key=counts.get))


def named(dtype: torch.dtype) -> str:
    """A dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def check_finite(source: Path, name: str, tensor: torch.Tensor, dtype: str) -> None:
    """Raises UserError if a tensor contains NaN or infinity, or would in this dtype."""
    if not tensor.numel():
        return
    extremes = torch.stack(tensor.aminmax())  # NaN if any number is; needs no memory, unlike isfinite
    if not extremes.isfinite().all():
        raise UserError(
            f"{shown(source)}: {name} contains NaN or infinity\n"
            "the model diverged, or the file is damaged: use another checkpoint or copy"
        )
    if not extremes.to(getattr(torch, dtype)).isfinite().all():
        largest = extremes.abs().max().item()
        raise UserError(
            f"{shown(source)}: {name} has numbers up to {largest:.4g}, which {dtype} cannot hold\n"
            "use --dtype bfloat16 or float32"
        )


def dtypes_of(
    tensors: dict[str, torch.Tensor], model: torch.nn.Module, dtype: str, reason: str | None
) -> dict[str, torch.dtype]:
    """The dtype of each of our tensors: parameters have `dtype`, buffers float32, as the model makes them.

    A buffer is the bias that balances experts: training moves it by steps that 16 bits may not hold. With a
    reason, says on stderr which parameters are stored in another dtype.
    """
    buffers = dict(model.named_buffers())
    dtypes = {name: torch.float32 if name in buffers else getattr(torch, dtype) for name in tensors}
    changed = [name for name in tensors if name not in buffers and tensors[name].dtype != dtypes[name]]
    if changed and reason:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        print(f"converted to {reason}: {', '.join(changed[:5])}{more}", file=sys.stderr)
    return dtypes


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor: model.safetensors, or the part that the index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return dict.fromkeys(names_in(single), single)
    if index.exists():
        return indexed_files(folder, index)
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{pickled[0]} is a pickle, which can run arbitrary code: only safetensors are read. If trusted, "
            "convert it:\nAutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise UserError(f"{shown(folder)} has no model.safetensors")


def indexed_files(folder: Path, index: Path) -> dict[str, Path]:
    """The file that holds each tensor in the index. Lists other tensors in these files on stderr."""
    content = runs.read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{shown(index)} is damaged: it has no weight_map from tensors to files")
    held = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).is_absolute() or ".." in re.split(r"[/\\]", file):
            raise UserError(
                f"{shown(index)} names a file outside of its folder, {file}\n"
                "put all parts of the model next to the index, and list them in it without a path"
            )
        if not (folder / file).is_file():
            raise UserError(f"{shown(folder)} has no file {file!r}, which {index.name} names")
        held[file] = names_in(folder / file)
    for name, file in weight_map.items():
        if name not in held[file]:
            raise UserError(
                f"{shown(index)} says that {file} holds {name}, but it does not\n"
                "the index and the parts do not match: download the folder again"
            )
    others = [f"{name} in {file}" for file in held for name in held[file] if weight_map.get(name) != file]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        print(f"ignored tensors not listed in {index.name}: {', '.join(others[:5])}{more}", file=sys.stderr)
    return {name: folder / file for name, file in weight_map.items()}


def names_in(path: Path) -> list[str]:
    """The names of the tensors in a file."""
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise checkpoint.damaged(path, error) from None


def reader(files: dict[str, Path]) -> Callable[[str], torch.Tensor]:
    """A function that reads the tensor of a name from its file, memory-mapped."""
    opened = {}

    def tensor(name: str) -> torch.Tensor:
        path = files[name]
        try:
            if path not in opened:
                opened[path] = safe_open(path, "pt")
            return opened[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise checkpoint.damaged(path, error) from None

    return tensor


def write_weights(
    run: Path, stage: str, weights: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype]
) -> None:
    """Writes the checkpoint of step 0."""
    (run / "last").mkdir()
    tensors.write(run / "last" / checkpoint.WEIGHTS, weights, {"stage": stage, "step": "0"}, dtypes)


def describe(source: Path, stage: str, model: torch.nn.Module, meta: dict, dtype: str) -> dict:
    """The content of the run's config.json."""
    return {
        "format": formats.RUN,
        "stage": stage,
        "code": edits.code_hash(stage),
        "dataset": meta["name"],
        "imported_from": str(source.resolve()),
        "settings": {"data": str(source), "tokenizer": meta["tokenizer"], "seed": 0, "steps": 0},
        "model": asdict(model.config),
        "dtype": dtype,
        "weights_dtype": dtype,
        "parameters": cost.parameters(model),
        "machine": runs.machine(torch.device("cpu")),
    }


if __name__ == "__main__":
    cli.run(main)
