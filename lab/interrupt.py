"""Ctrl-C and SIGTERM as a wish to stop after this step, so that the run can be saved first."""

import signal

from lab import parallel


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
