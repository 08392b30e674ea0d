"""A process that works for another one, and ends with it. This module imports only the standard library."""

import os
import signal
import sys
import threading


def prepare(niceness: int) -> str:
    """Lowers the priority (by at most 19), and ends the process when stdin is closed. Returns its first line.

    stdin is a pipe from the other process: it closes when that process ends, however it ends.
    """
    os.nice(niceness)
    os.setpgrp()  # a group of its own, which Ctrl-C does not reach
    line = sys.stdin.readline()
    threading.Thread(target=end_with_stdin, daemon=True).start()
    return line


def end_with_stdin() -> None:
    """Ends this process, and those that it has started, when its stdin is closed."""
    sys.stdin.read()
    os.killpg(0, signal.SIGTERM)
