"""Tokenizes large collections of documents into shards: token files of a fixed length.

A prepared folder holds train-00000.bin, train-00001.bin, …, val-00000.bin, … (uint16 token ids, nothing
else), meta.json, and checked.json (see `shards.check`). While incomplete, the folder is called
.unfinished-NAME/tokens, and state.json beside it records the progress. Everything up to that point is on
disk. After a kill, whatever was written beyond it is truncated, so the result has the same bytes as an
uninterrupted preparation.
"""

import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data import files, workers
from data.prepare import SPLITS, Dataset
from data.shards import Shards, check, seen, sha256_of_file
from data.sources import PART, BadDocument, Part, Source
from data.tokenizers import GPT2Tokenizer
from lab import formats
from lab.errors import UserError

SHARD_TOKENS = 100_000_000
HELD_OUT_SEED = 2357  # as in nanoGPT
BLOCK = PART  # characters of text that a process tokenizes at once
SECONDS_BETWEEN_STATES = 10


class Block(NamedTuple):
    parts: dict[str, list[tuple[str, bool]]]  # by split: texts, and whether each ends its document
    place: tuple[int, int]  # where to resume reading the source
    n_parts: int  # parts of the source read so far
    done: int  # bytes of the source's files read so far


def held_out(part: int, every: int) -> bool:
    """Whether part number `part` (usually a whole document) is held out for validation.

    nanoGPT draws 0.05 % of OpenWebText's documents when it has all of them (train_test_split, seed 2357).
    Here documents are streamed, so one of every `every` consecutive parts is drawn, by a generator seeded
    with the same seed and the position of that run of parts. The share is the same, the documents differ.
    """
    return part % every == _drawn(part // every, every)


@functools.lru_cache(maxsize=16)
def _drawn(run: int, every: int) -> int:
    return int(np.random.default_rng((HELD_OUT_SEED, run)).integers(every))


def prepare(
    name: str,
    source: Source,
    folder: Path,
    every: int,
    n_workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Dataset:
    """Tokenizes the source into `folder` and opens it; resumes an interrupted preparation.

    One of every `every` parts is held out. n_workers is the number of processes (None: one per core). The
    bytes written depend neither on it nor on interruptions. Raises UserError if the source cannot be read,
    has too few documents, or is being prepared by another process.
    """
    unfinished = unfinished_folder(folder)
    plan = {"source": source.where, "identity": source.identity, "every": every, "shard_tokens": shard_tokens}
    with _alone(unfinished):
        if not folder.exists():  # another process may have finished it in the meantime
            writer = _Writer(unfinished, plan)
            try:
                _tokenize(source, writer, every, n_workers or os.cpu_count())
                writer.finish(name, source)
                os.rename(writer.folder, folder)
            except BaseException as error:
                # This preparation can never be resumed: fixing the file makes it a different source.
                if isinstance(error, BadDocument) or not writer.path.exists():
                    shutil.rmtree(unfinished)
                if isinstance(error, OSError):
                    raise UserError(
                        f"cannot write in {unfinished} ({error.strerror or error})\n"
                        f"free some space and rerun the command: it resumes; or change DATA_DIR"
                    ) from error
                raise
        shutil.rmtree(unfinished, ignore_errors=True)
    return open_prepared(folder)


def unfinished_folder(folder: Path) -> Path:
    """The folder in which `folder` is prepared until it is complete."""
    return folder.with_name(f".unfinished-{folder.name}")


def read_state(unfinished: Path) -> dict:
    """The state of a preparation; empty if it has not begun."""
    try:
        return json.loads((unfinished / "state.json").read_text())
    except (FileNotFoundError, ValueError):  # not begun, or truncated by a power failure
        return {}


@contextmanager
def _alone(unfinished: Path) -> Iterator[None]:
    """Locks the folder for this process. The lock is released however the process ends."""
    import fcntl  # here because Windows lacks it, and the rest of data/ works there

    try:
        unfinished.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write in {unfinished.parent} ({error})\nset DATA_DIR to a writable folder"
        ) from error
    held = os.open(unfinished, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another process is preparing {unfinished}: wait for it to finish") from None
    finally:
        os.close(held)


def _tokenize(source: Source, writer: "_Writer", every: int, n_workers: int) -> None:
    state = writer.state
    parts = source.parts(tuple(state["place"]))
    with workers.started(n_workers) as running, _Report(source, state) as report:
        for block, found in running.map(_blocks(parts, state["parts"], every)):
            for split, (tokens, n_bytes) in found.items():
                writer.add(split, tokens, n_bytes)
            state.update(place=block.place, parts=block.n_parts)
            writer.save_at_times()
            report.update(block.done, state["tokens"])


def _blocks(parts: Iterable[Part], n_parts: int, every: int) -> Iterator[Block]:
    """Groups the parts into blocks of about BLOCK characters; n_parts is the number of parts before them."""
    block, size = {split: [] for split in SPLITS}, 0
    place = done = None
    for part in parts:
        block["val" if held_out(n_parts, every) else "train"].append((part.text, part.ends))
        n_parts += 1
        size += len(part.text)
        if size >= BLOCK and part.place:
            yield Block(block, part.place, n_parts, part.done)
            block, size = {split: [] for split in SPLITS}, 0
        place, done = part.place, part.done
    if size or any(block.values()):
        yield Block(block, place, n_parts, done)


class _Writer:
    """The token files of an unfinished preparation, and its state."""

    def __init__(self, unfinished: Path, plan: dict):
        self.path = unfinished / "state.json"
        self.folder = unfinished / "tokens"
        self.shard_tokens = plan["shard_tokens"]
        self.state = read_state(unfinished)
        formats.check(self.state, formats.DATA, str(self.path))
        if self.state and self.state["plan"] != plan:
            before = self.state["plan"]
            differs = [key for key in plan if plan[key] != before[key] and key != "identity"]
            what = ", ".join(f"{key} {before[key]}, not {plan[key]}" for key in differs)
            changed = "read files that have changed since, or read them with an older version of this program"
            raise UserError(
                f"an unfinished preparation has {what or changed}\n"
                f"use the same settings, or delete {unfinished} to start over"
            )
        self.files = {}
        try:
            self._cut_off()
        except (OSError, ValueError) as error:
            if self.state:
                print(f"{unfinished} cannot be resumed ({error}): starting over", file=sys.stderr)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            self.state = {
                "format": formats.DATA,
                "plan": plan,
                "place": (0, 0),
                "parts": 0,
                "tokens": dict.fromkeys(SPLITS, 0),
                "bytes": dict.fromkeys(SPLITS, 0),
                "shards": {},  # complete shards by name: their tokens and sha256
                "seen": {},  # size and times by name, which `check` compares
            }
            self._cut_off()
        self.saved_at = time.monotonic()

    def _cut_off(self) -> None:
        """Opens each split's last shard and truncates it to the tokens that the state counts.

        Raises ValueError if there is no state, or if the files do not match it.
        """
        if not self.state:
            raise ValueError("no state")
        expected = set(self.state["shards"])
        for split in SPLITS:
            number, tokens = divmod(self.state["tokens"][split], self.shard_tokens)
            path = self.folder / f"{split}-{number:05d}.bin"
            self.files[split] = _to_extend(path)
            if path.stat().st_size < 2 * tokens:
                raise ValueError(f"{path.name} is too short")
            self.files[split].truncate(2 * tokens)
            expected.add(path.name)
        for name, shard in self.state["shards"].items():
            path, known = self.folder / name, self.state["seen"]
            if seen(path) != known[name] and sha256_of_file(path) != shard["sha256"]:
                raise ValueError(f"{name} has changed")
            known[name] = seen(path)  # the times differ if the folder was copied
        for path in self.folder.iterdir():
            if path.name not in expected:
                path.unlink()

    def add(self, split: str, tokens: np.ndarray, n_bytes: int) -> None:
        """Appends tokens. Closes a full shard and begins the next one."""
        counts = self.state["tokens"]
        while len(tokens):
            here, tokens = np.split(tokens, [self.shard_tokens - counts[split] % self.shard_tokens])
            content = memoryview(here.tobytes())
            while content:
                content = content[self.files[split].write(content) :]
            counts[split] += len(here)
            if counts[split] % self.shard_tokens == 0:
                self._close(split)
                number = counts[split] // self.shard_tokens
                self.files[split] = _to_extend(self.folder / f"{split}-{number:05d}.bin")
        self.state["bytes"][split] += n_bytes

    def _close(self, split: str) -> None:
        file = self.files.pop(split)
        os.fsync(file.fileno())
        file.close()
        path = Path(file.name)
        self.state["shards"][path.name] = {
            "tokens": path.stat().st_size // 2,
            "sha256": sha256_of_file(path),
        }
        self.state["seen"][path.name] = seen(path)

    def save_at_times(self) -> None:
        if time.monotonic() - self.saved_at > SECONDS_BETWEEN_STATES:
            self.save()

    def save(self) -> None:
        """Flushes all tokens to disk, then writes the state that counts them."""
        for file in self.files.values():
            os.fsync(file.fileno())
        files.write(self.path, json.dumps(self.state).encode())
        self.saved_at = time.monotonic()

    def finish(self, name: str, source: Source) -> None:
        """Closes the last shards and writes meta.json."""
        state = self.state
        if min(state["tokens"].values()) < 2:  # an input and its target
            raise BadDocument(
                f"{source.where} has {state['parts']:,} documents: too few for training and validation\n"
                f"one of every {state['plan']['every']:,} is held out: use more documents"
            )
        failure = without_text(source.where, state["bytes"])
        if failure:
            raise BadDocument(failure)
        for split in SPLITS:
            if state["tokens"][split] % self.shard_tokens:
                self._close(split)
            else:  # this shard is empty: the last token filled the previous one
                os.unlink(self.files.pop(split).name)
        meta = {
            "format": formats.DATA,
            "name": name,
            "tokenizer": GPT2Tokenizer.name,
            "vocab_size": GPT2Tokenizer.vocab_size,
            "dtype": "uint16",
            "tokens": state["tokens"],
            "bytes": state["bytes"],  # for bits per byte: of the texts, without separators
            "source": source.where,
            "held_out": f"1 of {state['plan']['every']} documents, seed {HELD_OUT_SEED}",
            "shards": dict(sorted(state["shards"].items())),
        }
        (self.folder / "checked.json").write_text(json.dumps(state["seen"], indent=2) + "\n")
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def without_text(where: str, n_bytes: dict[str, int]) -> str:
    """The error message if all documents of a split are empty, else an empty string."""
    if all(n_bytes[split] for split in SPLITS):
        return ""
    if not any(n_bytes.values()):
        return f"all documents of {where} are empty\nuse documents with text"
    which = "held out for validation" if n_bytes["train"] else "for training"
    return f"all documents of {where} {which} are empty\nuse more documents with text"


def _to_extend(path: Path) -> BinaryIO:
    return open(path, "ab", buffering=0)


class _Report:
    """Reports progress on stderr: a live bar on a terminal, else a line every few seconds."""

    def __init__(self, source: Source, state: dict):
        self.console = Console(stderr=True, highlight=False)
        self.live = self.console.is_terminal
        self.progress = Progress(
            TextColumn("tokenizing"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:.1f} %  {task.fields[report]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self.total = max(1, sum(source.sizes))
        self.task = self.progress.add_task("", total=self.total, report="")
        self.tokens_before, self.done_before = sum(state["tokens"].values()), None
        self.started = self.printed_at = time.monotonic()
        if state["parts"]:
            self.console.print(f"resuming after {self.tokens_before:,} tokens")

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *exception):
        self.progress.stop()

    def update(self, done: int, tokens: dict[str, int]) -> None:
        """done: bytes of the source's files read so far; tokens: number of tokens by split."""
        now = time.monotonic()
        n_tokens, seconds = sum(tokens.values()), max(now - self.started, 1e-9)
        report = f"{n_tokens:,} tokens  {(n_tokens - self.tokens_before) / seconds:,.0f} tokens/s"
        if self.done_before is None:  # measure the speed since this process began
            self.done_before = done
            self.progress.reset(self.task, completed=done, report=report)
        self.progress.update(self.task, completed=done, report=report)
        if not self.live and now - self.printed_at > SECONDS_BETWEEN_STATES:
            self.printed_at = now
            line = f"{done / self.total:.1%}  {report}"
            if done > self.done_before:
                bytes_per_second = (done - self.done_before) / seconds
                line += f", {(self.total - done) / bytes_per_second / 60:,.0f} min left"
            self.console.print(line, soft_wrap=True)


def open_prepared(folder: Path) -> Dataset:
    """Opens a prepared folder. Raises UserError that names a missing, truncated or changed shard."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        formats.check(meta, formats.DATA, str(folder / "meta.json"))
        names = {split: [name for name in meta["shards"] if name.startswith(split)] for split in SPLITS}
        tokens = {split: sum(meta["shards"][name]["tokens"] for name in names[split]) for split in SPLITS}
        if tokens != meta["tokens"] or min(tokens.values()) < 2:
            raise ValueError("its shards do not add up to its tokens")
        without = without_text(meta["source"], meta["bytes"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} is damaged ({error})\ndelete that folder and run again") from error
    if without:  # prepared by an older version, which did not check this
        raise UserError(without)
    check(folder, meta["shards"])
    train, val = (Shards([folder / name for name in names[split]]) for split in SPLITS)
    return Dataset(meta["name"], folder, meta, train, val, GPT2Tokenizer())
