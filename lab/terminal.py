"""Handles Ctrl-C and the standard streams from a command's first line on.

Importing torch takes seconds, so a command calls `prepare` before it imports anything heavy. This module
imports only the standard library.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def prepare() -> None:
    """Makes Ctrl-C end the process without a traceback, and lets stdout and stderr accept any text."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored: keep it so
        signal.signal(signal.SIGINT, end_quietly)
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed, as by `>&-`: the next file opened would get this number, and our output
            descriptor = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(descriptor, True)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        stream = getattr(sys, name)
        if stream.errors in ("strict", "surrogateescape"):  # else the user has set PYTHONIOENCODING
            stream.reconfigure(errors="backslashreplace")


def end_quietly(number, frame):
    """Handles SIGINT while there is nothing to save. (It raises nothing: an import could swallow it.)"""
    os.write(2, b"\ninterrupted\n")
    os._exit(128 + number)


@contextmanager
def interrupts_raise() -> Iterator[None]:
    """Makes Ctrl-C raise KeyboardInterrupt within the block, if `prepare` has made it end the process."""
    if signal.getsignal(signal.SIGINT) is not end_quietly:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, end_quietly)
