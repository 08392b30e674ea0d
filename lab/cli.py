"""The command line: flags from a dataclass, errors in one or two lines."""

import contextlib
import dataclasses
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

SECONDS_FOR_THE_FIRST = 10


def parse_flags(kind: type, argv: list[str], **options):
    """Calls tyro.cli and turns its boxed error messages into a one-line UserError."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(kind, args=argv, prog=program(), **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    # tyro draws a box: a title, the message, a rule, then hints. (The rule is of - if ─ cannot be printed.)
    _, *lines = (line.strip("╭╮╰╯│─ ") for line in stderr.getvalue().splitlines())
    hints = iter(list(dropwhile(is_rule, lines)))
    message = " ".join(takewhile(lambda line: not is_rule(line), hints)).rstrip(".")
    raise UserError(f"{message}. {did_you_mean(message, hints)}See {program()} --help")


def parse_benchmark_flags(kind: type, argv: list[str], may_be_0: tuple[str, ...] = ()):
    """As parse_flags, for a benchmark: its numbers count or measure something, so they must be above 0.

    Except the fields in may_be_0. A flag with several values must have one at least, unless it has none by
    default.
    """
    settings = parse_flags(kind, argv)
    for field in dataclasses.fields(kind):
        flag, value = f"--{field.name.replace('_', '-')}", getattr(settings, field.name)
        if value == () != field.default:
            raise UserError(f"{flag} needs at least one value")
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float) or isinstance(number, bool):
                continue
            if not (number > 0 or (number == 0 and field.name in may_be_0)):
                raise UserError(f"{flag} must be above 0, not {number}")
    return settings


def program() -> str:
    """The command that started this process, as a user would type it."""
    spec = sys.modules["__main__"].__spec__  # None for a script
    if spec:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return f"python {shown(Path(sys.argv[0]))}"


def did_you_mean(message: str, hints: Iterable[str]) -> str:
    """Asks whether the user meant a similar flag or value; empty if there is none."""
    hints = list(hints)
    choice = re.search(r"invalid choice '(.*?)' .*Expected one of \((.*)\)", message)
    if choice:
        close = difflib.get_close_matches(choice[1], re.findall(r"'(.*?)'", choice[2]), n=1)
    elif hints and hints[0].startswith("Perhaps you meant"):  # tyro lists similar flags, the closest first
        close = [hint.split()[0].rstrip(",") for hint in hints if hint.startswith("--")][:1]
    else:
        close = []
    return f"Did you mean {close[0]}? " if close else ""


def is_rule(line: str) -> bool:
    """Whether the line is a separator: empty, or only dashes."""
    return not line.strip("-")


def run(main: Callable[[], None]) -> None:
    """Calls main. Prints an error that the user can fix in one or two lines on stderr, with exit status 2."""
    fixable = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS}
    fixable |= {errno.EEXIST, errno.ENOTDIR, errno.EISDIR}  # a file where a folder should be, or the reverse
    try:
        with terminal.interrupts_raise():
            main()
            sys.stdout.flush()  # raises a write error here instead of at interpreter exit
    except UserError as error:
        sys.exit(fail(str(error)))
    except NotImplementedError as error:
        if not str(error).startswith("exercise "):  # as exercise.py writes it into a blank
            raise
        sys.exit(fail(f"not written yet: {error}"))
    except BrokenPipeError:  # the reader of our output has exited, as in `sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in fixable:
            raise
        sys.exit(fail(f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def fail(message: str) -> int:
    """Prints the error; returns the exit status.

    If all of torchrun's processes fail alike, only the first one's message appears: the others wait, and
    torchrun stops them once the first has exited.
    """
    rank = int(os.environ.get("RANK", 0))
    time.sleep(SECONDS_FOR_THE_FIRST if rank else 0)
    process = f"process {rank}: " if "RANK" in os.environ else ""
    print(f"error: {process}{message}", file=sys.stderr, flush=True)
    return 2
