"""The data folder, and reading and writing files in it without ever leaving a half-written one."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import atomic
from lab.errors import UserError


def root() -> Path:
    """The folder that holds `tokens/` and `cache/`: DATA_DIR, or data/ if that is not set."""
    return Path(os.environ.get("DATA_DIR") or Path(__file__).parent).expanduser()


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """As lab.atomic.scratch. Raises UserError if `parent` is not writable."""
    with writing_in(parent), atomic.scratch(parent) as folder:
        yield folder


def write(path: Path, content: bytes) -> None:
    """As lab.atomic.write. Raises UserError if the folder is not writable."""
    with writing_in(path.parent):
        atomic.write(path, content)


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Turns an OSError of the block into a UserError that names DATA_DIR."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write in {folder} ({error})\nset DATA_DIR to a writable folder") from error


def read(path: Path) -> bytes:
    """The bytes of a file that the user named. Raises UserError if it cannot be read or is empty."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if not content:
        raise UserError(f"{path} is empty: it must contain the text to train on")
    return content


def read_text(path: Path) -> str:
    """The UTF-8 text of a file that the user named, without a byte-order mark and with \\n line endings.

    Raises UserError if the file cannot be read, is empty, or is not UTF-8.
    """
    return decoded(read(path), path)


def decoded(content: bytes, name: Path | str) -> str:
    """Decodes UTF-8 as in read_text. Raises UserError, which mentions `name`, if it is not UTF-8."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start:,}\n"
            f"save it as UTF-8 (in most editors: Save As, encoding UTF-8), or convert it with iconv"
        ) from error
    return newlines(text)


def newlines(text: str) -> str:
    """The text with Windows (\\r\\n) and classic Mac (\\r) line endings replaced by newlines."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def say(message: str) -> None:
    """Prints a line on stderr, under torchrun in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
