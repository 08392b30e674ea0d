"""Reads documents from parquet, JSONL or text files, on this machine or in a dataset on the hub.

Documents are streamed, so memory use stays constant. Reading can start at any document, so an interrupted
preparation can resume.
"""

import codecs
import hashlib
import json
import stat
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data import cuts, files
from lab import optional
from lab.errors import UserError

COLUMN = "text"
KINDS = (".parquet", ".jsonl", ".txt")
READING = 2  # increase it when the same files yield other documents, so that older token files are not reused
PART = 2**20  # bytes (of a text file) or characters: longer documents are tokenized in parts
ROWS = 64  # of a parquet file, read at once
HUB_TIMEOUT = 10  # seconds


class BadDocument(UserError):
    """The content of a file is invalid: retrying will not help."""


class Part(NamedTuple):
    text: str  # a document, or about PART of it
    ends: bool  # whether the document ends here
    place: tuple[int, int] | None  # where to resume after it: a file's number and the offset in it (rows or
    #                                bytes); None inside a document that must be read from its start
    done: int  # bytes of the files read so far


@dataclass(frozen=True)
class Source:
    where: str  # folder, file, or dataset@revision
    kind: str  # one of KINDS
    names: list[str]  # the files, in order
    sizes: list[int]  # bytes of each
    identity: str  # a sha256 that changes when the files change
    open: Callable[[str], BinaryIO]
    failures: type = OSError  # the exceptions that opening and reading may raise

    def parts(self, place: tuple[int, int] = (0, 0)) -> Iterator[Part]:
        """The documents from `place` on, in order. Raises BadDocument that names an invalid file."""
        first, offset = place
        read = {".parquet": parquet_rows, ".jsonl": json_lines, ".txt": text_parts}[self.kind]
        for number in range(first, len(self.names)):
            before, name = sum(self.sizes[:number]), self.names[number]
            named = self.where if Path(self.where).name == name else f"{name} in {self.where}"
            try:
                with self.open(name) as file:
                    for text, ends, after, share in read(file, offset, self.sizes[number]):
                        done = before + int(share * self.sizes[number])
                        try:
                            *begun, last = cuts.parts(text, PART)
                        except cuts.Unbroken as error:
                            place = f"row {after - 1:,}" if self.kind == ".parquet" else f"byte {after:,}"
                            raise BadDocument(f"the text that ends at {place}: {error}") from None
                        yield from (Part(part, False, None, done) for part in begun)
                        yield Part(last, ends, (number, after), done)
            except BadDocument as error:
                raise BadDocument(f"{named}: {error}") from None
            except self.failures as error:
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise UserError(
                    f"cannot read {named} ({reason})\nrun again when it can be read: preparation then resumes"
                ) from error
            offset = 0


def in_folder(folder: Path) -> Source:
    """The .parquet, .jsonl or .txt files in a folder and its subfolders, sorted by path.

    Raises UserError if there is no such folder, if it has no such files, or more than one kind of them.
    """
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"no folder {folder}")
    return of_files(folder, *files_of(folder))


def of_files(where: Path, kind: str, paths: list[Path]) -> Source:
    """A source of files of one kind: those in the folder `where`, or the file `where` itself."""
    folder = where if where.is_dir() else where.parent
    stats = [path.stat() for path in paths]
    names = [path.relative_to(folder).as_posix() for path in paths]
    listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats, strict=True)]
    identity = hashlib.sha256(json.dumps([READING, listed]).encode()).hexdigest()
    if kind == ".parquet":
        import_datasets()
    sizes = [stat.st_size for stat in stats]
    return Source(str(where), kind, names, sizes, identity, lambda name: open(folder / name, "rb"))


def files_of(folder: Path) -> tuple[str, list[Path]]:
    """The kind of the data files in a folder (one of KINDS), and their paths, sorted.

    Prints the ignored files on stderr. Raises UserError if there are no data files, or more than one kind.
    """
    found, left_out = _walk(folder)
    others = "; ".join(f"{len(paths):,} {why} ({_some(folder, paths)})" for why, paths in left_out.items())
    kinds = [kind for kind in KINDS if any(path.suffix.lower() == kind for path in found)]
    if not kinds:
        raise UserError(
            f"the folder {folder} has no .parquet, .jsonl or .txt files"
            f"{f' to read, but {others}' if others else ''}\n"
            f"add parquet or JSONL files with a column {COLUMN!r}, or UTF-8 text files that end in .txt"
        )
    if len(kinds) > 1:
        raise UserError(
            f"the folder {folder} has files of more than one kind: {', '.join(kinds)}\n"
            f"keep one kind and move the others elsewhere"
        )
    if others:
        files.say(f"ignored in {folder}: {others}")
    return kinds[0], found


def _walk(folder: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """The data files in a folder and its subfolders, and the ignored paths by reason.

    Follows links, but lists each file once.
    """
    found, left_out = [], defaultdict(list)
    again = "duplicate"
    folders, linked, entered = deque([folder]), deque(), set()
    while folders or linked:
        here = (folders or linked).popleft()  # linked folders last: prefer a file's own path to a linked one
        real = here.resolve()
        if real in entered:
            left_out[again].append(here)
            continue
        entered.add(real)
        try:
            paths = sorted(here.iterdir())
        except OSError:
            left_out["unreadable"].append(here)
            continue
        for path in paths:
            try:
                about = path.stat()
            except OSError:
                left_out["broken link" if path.is_symlink() else "unreadable"].append(path)
                continue
            if path.name.startswith("."):
                left_out["hidden"].append(path)
            elif stat.S_ISDIR(about.st_mode):
                later = linked if path.is_symlink() else folders
                later.append(path)
            elif not stat.S_ISREG(about.st_mode):
                left_out["neither a file nor a folder"].append(path)
            elif path.suffix.lower() not in KINDS:
                left_out["not .parquet, .jsonl or .txt"].append(path)
            elif about.st_size == 0:
                left_out["empty"].append(path)
            else:
                found.append((path, path.resolve() if path.is_symlink() else real / path.name))
    kept = {}
    for path, real in sorted(found, key=lambda pair: (pair[0] != pair[1], pair[0])):  # links come last
        if real in kept:
            left_out[again].append(path)
        else:
            kept[real] = path
    return sorted(kept.values()), left_out


def _some(folder: Path, paths: list[Path]) -> str:
    names = [path.relative_to(folder).as_posix() for path in sorted(paths)[:3]]
    return ", ".join([*names, "…"] if len(paths) > 3 else names)


def on_hub(repository: str, revision: str | None) -> Source:
    """Streams the parquet files of a dataset on the Hugging Face hub. revision: None for the newest.

    Raises UserError if the hub cannot be reached.
    """
    import_datasets()
    from datasets.utils.file_utils import xopen  # retries when the network fails for a while
    from huggingface_hub import HfApi

    try:
        found = HfApi().dataset_info(repository, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT)
    except Exception as error:  # several libraries raise their own kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"cannot reach the dataset {repository} on the Hugging Face hub: {reason[0]}\n"
            f"download its parquet files elsewhere, then run: python -m data.openwebtext --source FOLDER"
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
        failures=Exception,  # several libraries raise their own kinds
    )


def import_datasets():
    """Imports the package datasets. Raises UserError if it is not installed."""
    return optional.load("datasets", extra="owt", needed_for="reading parquet files")


# Each reader yields, beginning at an offset: a text, whether its document ends there, the offset after it,
# and the fraction of the file read so far.


def parquet_rows(file: BinaryIO, offset: int, size: int) -> Iterator[tuple[str, bool, int, float]]:
    """Reads the rows of a parquet file; offsets count rows."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file, buffer_size=2**20)  # do not load a whole row group at once
        if COLUMN not in table.schema_arrow.names:
            raise no_column(table.schema_arrow.names)
        row = 0
        for group in range(table.num_row_groups):
            n_rows = table.metadata.row_group(group).num_rows
            if row + n_rows <= offset:  # skip without reading
                row += n_rows
                continue
            for batch in table.iter_batches(ROWS, row_groups=[group], columns=[COLUMN]):
                for text in batch.column(0).to_pylist()[max(0, offset - row) :]:
                    at = max(row, offset)
                    yield checked(text, f"row {at:,}"), True, at + 1, (at + 1) / table.metadata.num_rows
                    offset = at + 1
                row += batch.num_rows
    except pyarrow.ArrowException as error:
        raise BadDocument(f"not a readable parquet file ({str(error).splitlines()[0]})") from error


def json_lines(file: BinaryIO, offset: int, size: int) -> Iterator[tuple[str, bool, int, float]]:
    """Reads the lines of a JSONL file; offsets count bytes."""
    file.seek(offset)
    for line in file:
        place = f"the line at byte {offset:,}"
        offset += len(line)
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:  # invalid JSON or invalid UTF-8
            raise BadDocument(f"{place} is not JSON ({error})") from error
        if not isinstance(found, dict) or COLUMN not in found:
            raise no_column(list(found) if isinstance(found, dict) else [], place)
        yield checked(found[COLUMN], place), True, offset, offset / size


def text_parts(file: BinaryIO, offset: int, size: int) -> Iterator[tuple[str, bool, int, float]]:
    """Reads a text file, which is one document, in parts; offsets count bytes."""
    wanted = PART
    while offset < size:
        file.seek(offset)
        content = file.read(wanted)
        ends = offset + len(content) >= size or len(content) < wanted
        try:  # an incomplete character at the end is left for the next part
            text = codecs.getincrementaldecoder("utf-8")().decode(content, final=ends)
        except UnicodeDecodeError as error:
            raise BadDocument(f"not UTF-8 at byte {offset + error.start:,}: save it as UTF-8") from error
        end = len(text) if ends else cuts.last(text, 0, len(text))
        if not end:
            if len(text) > cuts.LONGEST:
                raise BadDocument(f"the text that begins at byte {offset:,}: {cuts.Unbroken(0)}")
            wanted *= 2
            continue
        text = text[:end]
        begins = offset == 0
        offset = size if ends else offset + len(text.encode())
        yield files.newlines(text.removeprefix("\ufeff") if begins else text), ends, offset, offset / size
        wanted = PART


def checked(text, place: str) -> str:
    """The text with unpaired surrogates replaced by U+FFFD. Raises BadDocument if it is not a string."""
    if not isinstance(text, str):
        raise BadDocument(f"{COLUMN!r} of {place} is {type(text).__name__}, not text")
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def no_column(names: list[str], place: str = "it") -> BadDocument:
    return BadDocument(f"{place} has no column {COLUMN!r}, only {', '.join(map(repr, names)) or 'none'}")
