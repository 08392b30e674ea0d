"""Ctrl-C and the standard streams, from a driver's first line on.

Importing torch takes seconds. So a driver calls `prepare` before it imports anything heavy, and this module
imports nothing but the standard library.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def prepare() -> None:
    """Makes Ctrl-C end the process without a traceback, and stdout and stderr take any text."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup ignores it: then it stays so
        signal.signal(signal.SIGINT, end_quietly)
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed, as by `>&-`: the next file to be opened would get what is printed
            lowest_free = os.open(os.devnull, os.O_RDWR)  # is this number
            os.set_inheritable(lowest_free, True)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        stream = getattr(sys, name)
        if stream.errors in ("strict", "surrogateescape"):  # else the user chose, with PYTHONIOENCODING
            stream.reconfigure(errors="backslashreplace")


def end_quietly(number, frame):
    """Handles SIGINT while there is nothing to save. (An import could swallow an exception.)"""
    os.write(2, b"\ninterrupted\n")
    os._exit(128 + number)


@contextmanager
def interrupts_raise() -> Iterator[None]:
    """Makes Ctrl-C a KeyboardInterrupt within the block, if `prepare` had made it end the process."""
    if signal.getsignal(signal.SIGINT) is not end_quietly:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, end_quietly)
