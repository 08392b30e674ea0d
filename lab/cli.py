"""The command line: flags from a dataclass, and errors in one or two lines."""

import contextlib
import difflib
import errno
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from itertools import dropwhile, takewhile
from pathlib import Path

import tyro

from lab import terminal
from lab.errors import UserError, shown

SECONDS_FOR_THE_FIRST = 3


def parse_flags(kind: type, argv: list[str], **options):
    """tyro.cli, with its boxed errors folded into the one line of a UserError."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(kind, args=argv, prog=program(), **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    # tyro draws a box: a title, then the message up to a rule, then hints. (Rules of - where there is no ─.)
    _, *lines = (line.strip("╭╮╰╯│─ ") for line in stderr.getvalue().splitlines())
    hints = iter(list(dropwhile(is_rule, lines)))
    message = " ".join(takewhile(lambda line: not is_rule(line), hints)).rstrip(".")
    raise UserError(f"{message}. {did_you_mean(message, hints)}See {program()} --help")


def program() -> str:
    """The command that started this process, as a user would type it."""
    spec = sys.modules["__main__"].__spec__  # None for a file
    if spec:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return f"python {shown(Path(sys.argv[0]))}"


def did_you_mean(message: str, hints: Iterable[str]) -> str:
    """The flag or value that was probably meant, as a question; empty where none is alike."""
    hints = list(hints)
    choice = re.search(r"invalid choice '(.*?)' .*Expected one of \((.*)\)", message)
    if choice:
        close = difflib.get_close_matches(choice[1], re.findall(r"'(.*?)'", choice[2]), n=1)
    elif hints and hints[0].startswith("Perhaps you meant"):  # tyro's flags, the closest first
        close = [hint.split()[0] for hint in hints if hint.startswith("--")][:1]
    else:
        close = []
    return f"Did you mean {close[0]}? " if close else ""


def is_rule(line: str) -> bool:
    """Whether the line divides others: empty or nothing but dashes."""
    return not line.strip("-")


def run(main: Callable[[], None]) -> None:
    """Calls main; what the user can mend becomes a line or two on stderr and exit status 2."""
    mendable = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS}
    mendable |= {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}  # a file where a folder should be, or the reverse
    try:
        with terminal.interrupts_raise():
            main()
            sys.stdout.flush()  # what cannot be written is better known here than at the interpreter's end
    except UserError as error:
        sys.exit(fail(str(error)))
    except BrokenPipeError:  # the reader of our output has gone, as in `sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in mendable:
            raise
        sys.exit(fail(f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def fail(message: str) -> int:
    """Prints the error; returns the exit status.

    Where all of torchrun's processes fail alike, the first speaks for them: it ends the others as they wait.
    """
    rank = int(os.environ.get("RANK", 0))
    time.sleep(SECONDS_FOR_THE_FIRST if rank else 0)
    process = f"process {rank}: " if "RANK" in os.environ else ""
    print(f"error: {process}{message}", file=sys.stderr, flush=True)
    return 2
