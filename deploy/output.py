"""A folder of results that is there whole or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import atomic
from lab.errors import UserError, shown


@contextmanager
def new_folder(out: Path, source: Path) -> Iterator[Path]:
    """A folder to write in; it becomes `out` when the block ends, and is gone when the block fails.

    UserError where `out` is in the folder that is read (`source`), is not empty, or cannot be made.
    """
    reason = why_not(out, source)
    if reason:
        raise UserError(f"{shown(out)} {reason}\nname another folder with --out")
    try:
        with atomic.scratch(out.parent) as scratch:
            unfinished = scratch / out.name
            unfinished.mkdir()
            yield unfinished
            if out.exists():
                out.rmdir()  # empty: Windows does not rename onto a folder
            os.rename(unfinished, out)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        file = f": {error.filename}" if error.filename else ""
        raise UserError(f"cannot write {shown(out)}: {error.strerror}{file}") from error


def why_not(out: Path, source: Path) -> str | None:
    """Why nothing is written to `out`; None where nothing speaks against it."""
    if out.resolve() == source.resolve():
        return "is the folder that is read"
    if source.resolve() in out.resolve().parents:
        return f"is inside the folder that is read, {shown(source)}"
    if out.exists() and not out.is_dir():
        return "is a file, not a folder"
    if out.exists() and any(out.iterdir()):
        return "exists and is not empty"
    return None
