"""Ctrl-C and SIGTERM as a wish to stop after this step, so that the run can be saved first."""

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lab import checkpoint, parallel
from lab.errors import shown

# What train.py writes before the first checkpoint, and what a checkpoint is called while it is written.
OURS = ("config.json", "meta.json", "metrics.jsonl", "best.tmp", "last.tmp")


class StopRequest:
    """A context manager; .signal is the signal received, or None. A second one stops at once.

    Not under torchrun: a terminal sends Ctrl-C to every process, and torchrun passes it on once more, perhaps
    when the run is already saved: what has been signalled once ignores the rest.
    """

    def __enter__(self):
        self.signal = None
        self.before = {
            number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exception):
        stopping = self.signal is not None and parallel.WORLD_SIZE > 1
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if stopping else handler)

    def receive(self, number, frame):
        if self.signal is not None and parallel.WORLD_SIZE == 1:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def nothing_left_without_a_checkpoint(folder: Path) -> Iterator[None]:
    """Removes a run that ends within the block, by an error or Ctrl-C, before its first checkpoint.

    Nothing could go on with it. Other files in its folder stay, and then the folder does too.
    """
    try:
        yield
    except BaseException:
        if parallel.RANK == 0 and not any(checkpoint.find(folder, name) for name in ("best", "last")):
            for path in (folder / name for name in OURS):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            with suppress(OSError):  # it holds something else
                folder.rmdir()
            print(f"nothing is saved: {shown(folder)} had no checkpoint yet")
        raise
