"""Ctrl-C, SIGTERM or a closed terminal as a wish to stop after this step, so that the run is saved first."""

import signal

from lab import parallel

# SIGHUP is what a process gets when its terminal is closed; Windows does not have it.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopRequest:
    """A context manager; .signal is the signal received, or None. A second one stops at once.

    Not under torchrun: a terminal sends Ctrl-C to every process, and torchrun passes it on once more, perhaps
    when the run is already saved: what has been signalled once ignores the rest.
    """

    def __enter__(self):
        self.signal = None
        heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup's
        self.before = {number: signal.signal(number, self.receive) for number in heeded}
        return self

    def __exit__(self, *exception):
        stopping = self.signal is not None and parallel.WORLD_SIZE > 1
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if stopping else handler)

    def receive(self, number, frame):
        if self.signal is not None and parallel.WORLD_SIZE == 1:
            raise KeyboardInterrupt
        self.signal = number
