"""A lock that one process at a time can hold, and that ends with the process, however it ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None


class Taken(Exception):
    """Another process holds the lock; .pid is its number, as text."""

    def __init__(self, pid: str):
        super().__init__(f"process {pid} has it")
        self.pid = pid


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds the lock file at path; raises Taken where another process has it.

    The file stays: whoever deleted it could lock a new one while the old one is still locked.
    """
    with open(path, "a+") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise Taken(file.read().strip() or "of another user") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
