"""Finds a stage's folder by number or name and loads its model.py."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

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
