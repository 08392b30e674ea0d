"""Files and folders that are written whole or not at all: written beside their place, then renamed to it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A temporary folder inside `parent`: write in it, then rename the finished thing to its place.

    It is gone afterwards, also when the block fails. If the process is killed, a `.partial-*` folder stays
    behind, which nothing reads.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".partial-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def write(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk, or leaves what was at `path` before."""
    with scratch(path.parent) as folder:
        write_synced(folder / path.name, content)
        os.replace(folder / path.name, path)


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file where it is, and waits until it is on the disk; for a folder that is renamed later."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
