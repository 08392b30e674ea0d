"""Imports a Hugging Face folder as a run: python -m deploy.import_hf DIR --out runs/NAME

GPT-2 becomes stage 0. Llama becomes stage 3 or, with fewer key/value heads than heads, stage 4; with scaled
positions, or heads of another width, llama3 (in family/). So does Mistral, but with a sliding window, or
heads of another width, it becomes mistral. Qwen2 and Qwen3 become qwen2 and qwen3. Mixtral becomes stage 6.
DeepSeek-V3 becomes stage 7 or, with YaRN, groups of experts or a latent for the queries, deepseek_v3 (in
family/). sample.py, train.py --init-from and deploy/export.py take the run. DIR must be on this machine: nothing is downloaded. Weights are
converted to float32. Anything that no stage can represent is refused, with its name. The run keeps the
tokenizer's files and generation_config.json for deploy/export.py. sample.py does not stop at eos_token_id, as
transformers does.
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

import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from data import from_meta
from data.tokenizers import HF_CONFIG, copy_side_files
from deploy import architectures, deepseek, gpt2, llama, mistral, mixtral, qwen, tokenizer_json
from deploy.output import new_folder
from lab import atomic, cli, device, formats, stages
from lab.errors import UserError, shown
from lab.storage import checkpoint, edits, runs
from lab.training import cost

COUNTERPARTS = {"gpt2": gpt2, "llama": llama, "mistral": mistral, "qwen2": qwen, "qwen3": qwen}
COUNTERPARTS |= {"mixtral": mixtral, "deepseek_v3": deepseek}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PICKLED = ("pytorch_model*.bin*", "*.pt", "*.pth", "*.ckpt")


@dataclass
class Settings:
    """Imports a Hugging Face folder as a run."""

    folder: tyro.conf.Positional[str]
    """Folder with config.json, model.safetensors and tokenizer.json."""
    out: str
    """Folder of the run to create."""


@device.memory_errors(
    "import needs about three times the memory of the float32 weights: close other programs, "
    "or use a larger machine"
)
def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    source, out = Path(settings.folder), Path(settings.out)
    config = read_config(source)
    files = tensor_files(source)
    stage = import_model(config, list(files), reader(files), source, out, source, None)
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
    messages. dtype is that of the run's weights. Raises UserError for anything that no stage can represent.
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
        tensors = read_weights(source, names, tensor, counterpart, model, sizes | layout)
        write_run(run, source, side, stage, model, tensors, meta | {"vocab_size": tokenizer.vocab_size})
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
        raise UserError(
            f"{shown(side / 'config.json')} has model_type {kind!r}; supported are {', '.join(COUNTERPARTS)}"
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
) -> dict[str, torch.Tensor]:
    """Our tensors in float32.

    Raises UserError that names the tensor, as the file does, if one is missing, unexpected, or has the wrong
    shape or dtype.
    """
    theirs = counterpart.full_names(read_tensors(source, names, tensor, counterpart.BUFFERS))
    buffers = sorted(name for name in theirs if re.search(counterpart.BUFFERS, name))
    if buffers:
        print(f"ignored tensors that are not weights: {', '.join(buffers)}", file=sys.stderr)
    theirs = {name: tensor for name, tensor in theirs.items() if name not in buffers}
    expected = counterpart.to_tensors(checkpoint.weights(model), sizes)
    if "lm_head.weight" in theirs.keys() - expected.keys():  # a tied matrix, saved as the head or twice
        head = theirs.pop("lm_head.weight")
        theirs.setdefault(counterpart.EMBEDDING, head)
        if not torch.equal(head, theirs[counterpart.EMBEDDING]):
            raise UserError(
                f"{shown(source)}: lm_head.weight differs from {counterpart.EMBEDDING}, but config.json has "
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
    return {name: t.contiguous() for name, t in counterpart.from_tensors(theirs, sizes).items()}


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


def read_tensors(
    source: Path, names: list[str], tensor: Callable[[str], torch.Tensor], no_weights: str
) -> dict[str, torch.Tensor]:
    """Reads the tensors; converts floating-point ones to float32, one by one so that few are in memory twice.

    Raises UserError if a tensor contains NaN or infinity, except those whose names match no_weights.
    """
    tensors = {}
    for name in names:
        read = tensor(name)
        if read.dtype in DTYPES:
            if not re.search(no_weights, name) and not read.isfinite().all():
                raise UserError(
                    f"{shown(source)}: {name} contains NaN or infinity\n"
                    "the model diverged, or the file is damaged: use another checkpoint or copy"
                )
            read = read.float()
        tensors[name] = read
    return tensors


def write_run(run: Path, source: Path, side: Path, stage: str, model, tensors: dict, meta: dict) -> None:
    """Writes the folder of a run at step 0."""
    (run / "last").mkdir()
    metadata = {"stage": stage, "step": "0"}
    atomic.write_synced(run / "last" / checkpoint.WEIGHTS, safetensors_bytes(tensors, metadata))
    copy_side_files(side, run)
    shutil.copyfile(side / "config.json", run / HF_CONFIG)
    runs.write_json(run / "meta.json", meta)
    config = {
        "format": formats.RUN,
        "stage": stage,
        "code": edits.code_hash(stage),
        "dataset": meta["name"],
        "imported_from": str(source.resolve()),
        "settings": {"data": str(source), "tokenizer": meta["tokenizer"], "seed": 0, "steps": 0},
        "model": asdict(model.config),
        "dtype": "float32",
        "parameters": cost.parameters(model),
        "machine": runs.machine(torch.device("cpu")),
    }
    runs.write_json(run / "config.json", config)


if __name__ == "__main__":
    cli.run(main)
