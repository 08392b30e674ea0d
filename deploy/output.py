"""Creates an output folder or file atomically."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import atomic
from lab.errors import UserError, shown


@contextmanager
def new_folder(out: Path, source: Path) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `out` at the end, or removed if the block fails.

    Raises UserError if `out` is inside the input folder `source`, is not empty, or cannot be created.
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


@contextmanager
def new_file(out: Path, source: Path) -> Iterator[Path]:
    """Yields the path of a temporary file, renamed to `out` at the end, or removed if the block fails.

    Raises UserError if `out` exists, is inside the input folder `source`, or cannot be created.
    """
    if out.exists():
        raise UserError(f"{shown(out)} exists\nname another file with --out")
    if source.resolve() in out.resolve().parents:
        raise UserError(f"{shown(out)} is inside the input folder, {shown(source)}\nname another with --out")
    try:
        with atomic.scratch(out.parent) as scratch:
            yield scratch / out.name
            os.replace(scratch / out.name, out)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        raise UserError(f"cannot write {shown(out)}: {error.strerror or error}") from error


def why_not(out: Path, source: Path) -> str | None:
    """The reason why `out` cannot be written, or None."""
    if out.resolve() == source.resolve():
        return "is the input folder"
    if source.resolve() in out.resolve().parents:
        return f"is inside the input folder, {shown(source)}"
    if out.exists() and not out.is_dir():
        return "is a file, not a folder"
    if out.exists() and any(out.iterdir()):
        return "exists and is not empty"
    return None
