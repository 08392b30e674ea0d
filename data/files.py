"""Where the data lies on disk, and how it is read and written so that nothing half-written is ever found."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import atomic
from lab.errors import UserError


def root() -> Path:
    """The folder that holds `tokens/` and `cache/`: this one, unless DATA_DIR names another."""
    return Path(os.environ.get("DATA_DIR") or Path(__file__).parent).expanduser()


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """lab.atomic.scratch; a UserError if `parent` cannot be written."""
    with writing_in(parent), atomic.scratch(parent) as folder:
        yield folder


def write(path: Path, content: bytes) -> None:
    """lab.atomic.write; a UserError if the folder cannot be written."""
    with writing_in(path.parent):
        atomic.write(path, content)


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Turns an OSError of the block into a UserError that names DATA_DIR."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write in {folder} ({error})\nset DATA_DIR to a folder that can be written"
        ) from error


def read(path: Path) -> bytes:
    """The bytes of a file that the user named. UserError if it cannot be read or is empty."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if not content:
        raise UserError(f"{path} is empty: it must hold the text to train on")
    return content


def read_text(path: Path) -> str:
    """The UTF-8 text of a file that the user named: no byte-order mark, lines ended by a newline alone.

    UserError if it cannot be read, is empty, or is not UTF-8.
    """
    return decoded(read(path), path)


def decoded(content: bytes, name: Path | str) -> str:
    """Text from UTF-8 as in read_text; `name` says where it is from, for the UserError if it is not UTF-8."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start:,}\n"
            f"save it as UTF-8 (in most editors: Save As, encoding UTF-8), or convert it with iconv"
        ) from error
    return newlines(text)


def newlines(text: str) -> str:
    """The text with the line ends of Windows (\\r\\n) and of old Macs (\\r) as newlines."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def say(message: str) -> None:
    """Prints a line on stderr, once a run: of torchrun's processes only the first prints it."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
