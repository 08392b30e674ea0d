"""Errors that the user can fix, and paths as messages show them."""

from pathlib import Path


class UserError(Exception):
    """An error that the user can fix: one or two lines with the value and the remedy.

    The commands print it on stderr and exit with status 2, without a traceback.
    """


def shown(path: Path) -> str:
    """The path, relative to the working directory if it is inside it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
