"""Writes files and folders atomically: first into a temporary folder, then renamed to their place."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A temporary folder inside `parent`: write into it, then rename the finished result to its place.

    It is deleted afterwards, even if the block fails. If the process is killed, a `.partial-*` folder
    remains, which nothing reads.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".partial-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def write(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on disk. If that fails, whatever was at `path` stays as it was."""
    with scratch(path.parent) as folder:
        write_synced(folder / path.name, content)
        os.replace(folder / path.name, path)


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file in place and waits until it is on disk; for files in a folder that is renamed later."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
