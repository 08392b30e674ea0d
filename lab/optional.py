"""Packages that only some commands need, and that may not be installed."""

import importlib
from types import ModuleType

from lab.errors import UserError


def load(module: str, extra: str, needed_for: str) -> ModuleType:
    """Imports a module. Raises UserError with the pip command if its package is not installed.

    extra: the group of optional dependencies in pyproject.toml that contains the package.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{needed_for} needs the package {package}: pip install -e '.[{extra}]'") from None
