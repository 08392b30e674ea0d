"""Imports a GGUF file, the format of llama.cpp, as a run: python -m deploy.import_gguf FILE --out runs/NAME

Quantized weights are converted to floats. The architectures llama (also with experts), qwen2, qwen3,
qwen3moe, gpt2, gptneox and deepseek2 become the stage or relative that deploy/import_hf.py chooses for the
same model. The tokenizer, its special tokens and the chat template are read from the file, too. Anything that
no stage can represent is refused, with its name.
"""

import sys
from pathlib import Path

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # first, because importing torch takes seconds

import json
import shlex
import tempfile
from dataclasses import dataclass
from typing import Literal

import tyro

from deploy import gguf_names, gguf_tokenizer, import_hf
from deploy.gguf_file import FLOATS, GGUFFile
from lab import cli, device
from lab.errors import UserError, shown
from lab.storage import runs


@dataclass
class Settings:
    """Imports a GGUF file as a run."""

    file: tyro.conf.Positional[str]
    """A .gguf file."""
    out: str
    """Folder of the run to create."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the run's weights; auto: that of the matrices, or float32 if they are quantized."""


@device.memory_errors(
    "import needs about the memory of the weights: choose --dtype bfloat16, or a larger machine"
)
def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    path, out = Path(settings.file), Path(settings.out)
    stage = import_file(path, out, None if settings.dtype == "auto" else settings.dtype)
    counted = f"{runs.read_config(out)['parameters']:,} parameters"
    print(f"imported {shown(path)} as {stage} with {counted} to {shown(out)}")
    print(f"to use it: python sample.py --run {shlex.quote(shown(out))}")


def import_file(path: Path, out: Path, dtype: str | None) -> str:
    """Writes a run at `out` from a GGUF file; returns the name of its stage.

    dtype is that of the run's weights; None: as for --dtype auto.
    """
    file = GGUFFile(path)
    config = gguf_names.to_config(file)
    readers = gguf_names.tensors_in(file, config)
    dtype = dtype or dtype_of(file)
    with tempfile.TemporaryDirectory() as side:
        config |= gguf_tokenizer.read(file, Path(side))
        Path(side, "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        try:
            return import_hf.import_model(
                config, list(readers), lambda name: readers[name](), Path(side), out, path, dtype
            )
        except UserError as error:
            if str(error).startswith("config.json"):  # which the user does not have
                raise UserError(f"{shown(path)}, in the format of Hugging Face: {error}") from None
            raise


def dtype_of(file: GGUFFile) -> str:
    """The dtype of the file's matrices if all have the same, except a few in float32; else float32."""
    kinds = {info.kind for info in file.tensors.values() if len(info.shape) > 1} - {"F32"}
    kind = kinds.pop() if len(kinds) == 1 else "F32"
    return str(FLOATS.get(kind, FLOATS["F32"])).removeprefix("torch.")


if __name__ == "__main__":
    cli.run(main)
