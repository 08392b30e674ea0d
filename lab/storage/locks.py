"""A lock that one process at a time can hold. It is released when the process ends, however it ends."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None


class Taken(Exception):
    """Another process holds the lock; .pid is its process ID, as text."""

    def __init__(self, pid: str):
        super().__init__(f"process {pid} holds the lock")
        self.pid = pid


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds the lock file at path; raises Taken if another process holds it.

    The file is never deleted: a process could then lock a new file while another still holds the old one.
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


@contextmanager
def waited_for(path: Path) -> Iterator[None]:
    """Holds the lock file at path; waits as long as another process holds it."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(held(path))
                break
            except Taken:
                time.sleep(1)
        yield
