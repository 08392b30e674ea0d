"""A folder of results that is there whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.errors import UserError, shown


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write in; it becomes `out` when the block ends, and is gone when the block fails.

    UserError where `out` exists and is not an empty folder, or cannot be made.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{shown(out)} exists and is not empty\ndelete it, or name another folder with --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=out.parent, prefix=".partial-", ignore_cleanup_errors=True
        ) as scratch:
            unfinished = Path(scratch, out.name)
            unfinished.mkdir()
            yield unfinished
            if out.exists():
                out.rmdir()  # empty: Windows does not rename onto a folder
            os.rename(unfinished, out)
    except OSError as error:
        raise UserError(f"cannot write {shown(out)}: {error.strerror}: {error.filename}") from error
