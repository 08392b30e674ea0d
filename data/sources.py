"""Where documents come from: the files of a folder, parquet, JSONL or text, or those of a dataset on the hub.

A source is read one document after another, and from any place on, so that memory stays flat and a killed
preparation goes on where it was.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lab.errors import UserError

COLUMN = "text"
KINDS = (".parquet", ".jsonl", ".txt")
PART = 2**20  # bytes: a longer document is tokenized in parts
ROWS = 64  # of a parquet file at once
HUB_TIMEOUT = 10  # seconds


class BadDocument(UserError):
    """A file that cannot be read as it is: to go on, it must change."""


class Part(NamedTuple):
    text: str  # of a document: all of it, or about PART bytes
    ends: bool  # whether the document does
    place: tuple[int, int] | None  # where to go on after it: a file's number and the offset in it (rows or
    #                                bytes); None inside a document that must be read from its start
    done: int  # bytes of the files that have been read so far


@dataclass(frozen=True)
class Source:
    where: str  # the folder, or dataset@revision
    kind: str  # one of KINDS
    names: list[str]  # the files, in order
    sizes: list[int]  # bytes of each
    identity: str  # sha256 that changes with the files
    open: Callable[[str], BinaryIO]
    failures: type = OSError  # what opening and reading may raise

    def parts(self, place: tuple[int, int] = (0, 0)) -> Iterator[Part]:
        """The documents from a place on, in order. BadDocument names the file that cannot be read."""
        first, offset = place
        read = {".parquet": parquet_rows, ".jsonl": json_lines, ".txt": text_parts}[self.kind]
        for number in range(first, len(self.names)):
            before, name = sum(self.sizes[:number]), self.names[number]
            try:
                with self.open(name) as file:
                    for text, ends, after, share in read(file, offset, self.sizes[number]):
                        done = before + int(share * self.sizes[number])
                        *begun, last = in_parts(text)
                        yield from (Part(part, False, None, done) for part in begun)
                        yield Part(last, ends, (number, after), done)
            except BadDocument as error:
                raise BadDocument(f"{name} in {self.where}: {error}") from None
            except self.failures as error:
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise UserError(
                    f"cannot read {name} in {self.where} ({reason})\n"
                    f"run again when it can be read: it goes on where it was"
                ) from error
            offset = 0


def in_folder(folder: Path) -> Source:
    """The files of a folder and the folders in it, sorted by path: .parquet, .jsonl or .txt, of one kind.

    Hidden ones are left out. UserError if there is no such folder, no such file, or more than one kind.
    """
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    by_kind = files_of(folder)
    if not by_kind:
        raise UserError(
            f"the folder {folder} has no .parquet, .jsonl or .txt files\n"
            f"put parquet or JSONL files with a column {COLUMN!r}, or UTF-8 texts that end in .txt, there"
        )
    if len(by_kind) > 1:
        raise UserError(
            f"the folder {folder} has files of more than one kind: {', '.join(by_kind)}\n"
            f"move those that are not the data elsewhere"
        )
    ((kind, paths),) = by_kind.items()
    stats = [path.stat() for path in paths]
    names = [path.relative_to(folder).as_posix() for path in paths]
    listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats, strict=True)]
    identity = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    if kind == ".parquet":
        import_datasets()
    sizes = [stat.st_size for stat in stats]
    return Source(str(folder), kind, names, sizes, identity, lambda name: open(folder / name, "rb"))


def files_of(folder: Path) -> dict[str, list[Path]]:
    """By kind, the data files in a folder and the folders in it, sorted by path; hidden ones left out."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in KINDS and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return {kind: paths for kind in KINDS if (paths := [path for path in found if path.suffix == kind])}


def on_hub(repository: str, revision: str | None) -> Source:
    """The parquet files of a dataset on the Hugging Face hub, streamed; revision: None for the newest.

    UserError if the hub cannot be reached.
    """
    import_datasets()
    from datasets.utils.file_utils import xopen  # open, with patience for a network that fails for a while
    from huggingface_hub import HfApi

    try:
        found = HfApi().dataset_info(repository, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT)
    except Exception as error:  # of several libraries
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"cannot reach the dataset {repository} on the Hugging Face hub: {reason[0]}\n"
            f"put its parquet files into a folder and run: python -m data.openwebtext --source FOLDER"
        ) from None
    listed = sorted((file.rfilename, file.size or 0) for file in found.siblings)
    listed = [(name, size) for name, size in listed if name.endswith(".parquet")]
    if not listed:
        raise UserError(f"the dataset {repository} on the Hugging Face hub has no parquet files")
    names, sizes = map(list, zip(*listed, strict=True))
    at = f"{repository}@{found.sha}"
    identity = hashlib.sha256(at.encode()).hexdigest()
    return Source(
        at,
        ".parquet",
        names,
        sizes,
        identity,
        lambda name: xopen(f"hf://datasets/{at}/{name}", "rb"),
        failures=Exception,  # of several libraries
    )


def import_datasets():
    """The package datasets; a UserError where it is not installed."""
    try:
        import datasets
    except ImportError:
        raise UserError("parquet files need the package datasets: pip install -e '.[owt]'") from None
    return datasets


# Each reader yields, from an offset on: a text, whether its document ends, the offset after it, and the share
# of the file that has been read.


def parquet_rows(file: BinaryIO, offset: int, size: int) -> Iterator[tuple[str, bool, int, float]]:
    """Rows of a parquet file; offsets are numbers of rows."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file, buffer_size=2**20)  # not a whole row group at once
        if COLUMN not in table.schema_arrow.names:
            raise no_column(table.schema_arrow.names)
        row = 0
        for group in range(table.num_row_groups):
            n_rows = table.metadata.row_group(group).num_rows
            if row + n_rows <= offset:  # not read at all
                row += n_rows
                continue
            for batch in table.iter_batches(ROWS, row_groups=[group], columns=[COLUMN]):
                for text in batch.column(0).to_pylist()[max(0, offset - row) :]:
                    at = max(row, offset)
                    yield checked(text, f"row {at:,}"), True, at + 1, (at + 1) / table.metadata.num_rows
                    offset = at + 1
                row += batch.num_rows
    except pyarrow.ArrowException as error:
        raise BadDocument(
            f"it is not a parquet file that can be read ({str(error).splitlines()[0]})"
        ) from error


def json_lines(file: BinaryIO, offset: int, size: int) -> Iterator[tuple[str, bool, int, float]]:
    """Lines of a JSONL file; offsets are bytes."""
    file.seek(offset)
    for line in file:
        place, offset = f"the line at byte {offset:,}", offset + len(line)
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:  # of JSON, or of UTF-8
            raise BadDocument(f"{place} is not JSON ({error})") from error
        if not isinstance(found, dict) or COLUMN not in found:
            raise no_column(list(found) if isinstance(found, dict) else [])
        yield checked(found[COLUMN], place), True, offset, offset / size


def text_parts(file: BinaryIO, offset: int, size: int) -> Iterator[tuple[str, bool, int, float]]:
    """A text file, which is one document, in parts; offsets are bytes."""
    while offset < size:
        file.seek(offset)
        content = file.read(PART)
        ends = offset + len(content) >= size
        end = len(content) if ends else boundary(content)
        try:
            text = content[:end].decode("utf-8-sig" if offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise BadDocument(
                f"it is not UTF-8 at byte {offset + error.start:,}: save it as UTF-8"
            ) from error
        offset += end
        yield text.replace("\r\n", "\n"), ends, offset, offset / size


def checked(text, place: str) -> str:
    """The text of a document, without halves of surrogate pairs; BadDocument if it is none."""
    if not isinstance(text, str):
        raise BadDocument(f"{COLUMN!r} of {place} is {type(text).__name__}, not text")
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def no_column(names: list[str]) -> BadDocument:
    return BadDocument(f"it has no column {COLUMN!r}, only {', '.join(map(repr, names)) or 'none'}")


def in_parts(text: str) -> list[str]:
    """A text in parts of at most about PART bytes, which give the same tokens as the whole."""
    if len(text) <= PART // 4:
        return [text]
    content, parts = text.encode(), []
    while len(content) > PART:
        end = boundary(content[:PART])
        parts.append(content[:end].decode())
        content = content[end:]
    return [*parts, content.decode()]


def boundary(content: bytes) -> int:
    """Where UTF-8 text can be cut near its end: before a space between two letters, digits or marks.

    GPT-2's pattern begins a new piece at each such space, so cutting there changes no token. Where the last
    64 KiB have none, the cut is before the last character.
    """
    start = max(0, len(content) - 2**16)
    spaces = [match.start() for match in re.finditer(rb"(?<=[!-~]) (?=[!-~])", content[start:])]
    if spaces:
        return start + spaces[-1]
    end = len(content) - 1
    while end > 1 and content[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return max(end, 1)
