"""Turns Ctrl-C, SIGTERM or a closed terminal into a request to stop after this step and save the run."""

import signal

from lab import parallel

SIGHUP = getattr(signal, "SIGHUP", None)  # sent when the terminal is closed; not on Windows
SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, SIGHUP) if number]


class StopRequest:
    """A context manager; .signal is the signal received, or None. A second signal stops at once.

    Under torchrun a second signal is ignored: a terminal sends Ctrl-C to every process, and torchrun forwards
    it again, perhaps after the run has been saved.
    """

    def __enter__(self):
        self.signal = None
        self.before = {}
        for number in SIGNALS:
            under_nohup = number == SIGHUP and signal.getsignal(number) is signal.SIG_IGN
            if not under_nohup:
                self.before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *exception):
        stopping = self.signal is not None and parallel.WORLD_SIZE > 1
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if stopping else handler)

    def receive(self, number, frame):
        if self.signal is not None and parallel.WORLD_SIZE == 1:
            raise KeyboardInterrupt
        self.signal = number
