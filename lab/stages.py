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
    return dict(sorted((number(name), name) for name in folders))


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


def number(name: str) -> int:
    """A stage's number, from its folder's name."""
    return int(re.match(r"stage(\d+)_", name).group(1))


def label(name: str) -> str:
    """A stage in a picture or a table: "4 gqa"."""
    return f"{number(name)} {name.split('_', 1)[1]}"


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
    width, value_width = head_widths(config)
    q = torch.empty((1, config.n_head, config.block_size, width), device=device, dtype=dtype)
    chosen = stage.choose_attention(config.attention, q, q, None, config.dropout)
    if chosen in ("flash_attn", "triton") and width != value_width:
        chosen = "sdpa"  # as in stage 7, for those know a single width
    if chosen == "triton" and not 16 <= width <= 128:
        raise UserError(
            f"--model.attention triton needs heads of 16 to 128 dimensions; here they have {width}"
        )
    if config.attention not in ("auto", chosen):
        needs = {
            "flash_attn": "CUDA, the package flash-attn (pip install -e '.[flash]') and --dtype bfloat16",
            "triton": "CUDA and --model.dropout 0",
        }[config.attention]
        given = f"here it is {device.type}, {str(dtype).removeprefix('torch.')}, dropout {config.dropout}"
        if width != value_width:
            needs = "queries and values of one width"
            given = f"here they have {width} and {value_width}"
        raise UserError(f"--model.attention {config.attention} needs {needs}; {given}")
    return chosen


def head_widths(config) -> tuple[int, int]:
    """Dimensions of a head's queries and of its values."""
    if hasattr(config, "v_head_dim"):  # stage 7
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    return (config.n_embd // config.n_head,) * 2
