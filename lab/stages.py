"""Finds a stage's folder by number or name and loads its model.py."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import torch

from lab.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def names() -> dict[int, str]:
    """The stages there are: number -> name of the folder, in order."""
    folders = (path.parent.name for path in ROOT.glob("stage*_*/model.py"))
    return dict(sorted((int(re.match(r"stage(\d+)_", name).group(1)), name) for name in folders))


def find(stage: str) -> str:
    """The folder's name of a stage given as number ("4") or name ("stage4_gqa")."""
    known = names()
    if stage in known.values():
        return stage
    if stage.isdecimal() and int(stage) in known:
        return known[int(stage)]
    raise UserError(f"unknown stage {stage!r}; the stages are: {listing()}")


def listing() -> str:
    """The stages in a line, for messages."""
    return ", ".join(f"{number} ({name})" for number, name in names().items())


def load(name: str) -> ModuleType:
    """The module stageN_…/model.py, which has GPTConfig and GPT."""
    if str(ROOT) not in sys.path:  # a script in another folder asks
        sys.path.append(str(ROOT))
    return importlib.import_module(f"{name}.model")


def attention(stage: ModuleType, config, device: torch.device, dtype: torch.dtype) -> str | None:
    """The name of what computes attention in training, None for a stage without the choice (before 5).

    A UserError where --model.attention asks for what can't be used.
    """
    if not hasattr(stage, "choose_attention"):
        return None
    head_dim = config.n_embd // config.n_head
    q = torch.empty((1, config.n_head, config.block_size, head_dim), device=device, dtype=dtype)
    chosen = stage.choose_attention(config.attention, q, q, None, config.dropout)
    if config.attention not in ("auto", chosen):
        needs = {
            "flash_attn": "CUDA, the package flash-attn (pip install -e '.[flash]') and --dtype bfloat16",
            "triton": "CUDA and --model.dropout 0",
        }[config.attention]
        given = f"here it is {device.type}, {str(dtype).removeprefix('torch.')}, dropout {config.dropout}"
        raise UserError(f"--model.attention {config.attention} needs {needs}; {given}")
    return chosen
