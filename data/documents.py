"""Data at size: documents to token files of a fixed length, the shards.

A prepared folder holds train-00000.bin, train-00001.bin, …, val-00000.bin, … (uint16 token ids, nothing
else), meta.json, and checked.json (see `shards.check`). It gets its name when it is complete. Until then it
is .unfinished-NAME/tokens, and state.json beside it says how far it is: everything up to there is on the
disk, and what a kill left beyond is cut off, so that the bytes in the end are those of a run never killed.
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
HELD_OUT_SEED = 2357  # nanoGPT's
BLOCK = PART  # bytes of text that a process tokenizes at once
SECONDS_BETWEEN_STATES = 10


class Block(NamedTuple):
    parts: dict[str, list[tuple[str, bool]]]  # by split: texts, and whether a document ends there
    place: tuple[int, int]  # where the source goes on
    n_parts: int  # of the source up to there
    done: int  # bytes of the source's files up to there


def held_out(part: int, every: int) -> bool:
    """Whether a part (a document, mostly) is held out, by its number: one of each `every` is.

    nanoGPT draws 0.05 % of OpenWebText's documents when it has all of them (train_test_split, seed 2357).
    Here they come one after the other, so of each `every` neighbours one is drawn, by a generator seeded with
    the same seed and their place: the share and its evenness are the same, the documents are others.
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
    """Tokenizes the source into `folder`, from where a killed preparation was, and opens it.

    One of each `every` parts is held out. Neither n_workers (None: one a core) nor a kill changes a byte.
    UserError if the source cannot be read, has too few documents, or another process is preparing it.
    """
    unfinished = unfinished_folder(folder)
    plan = {"source": source.where, "identity": source.identity, "every": every, "shard_tokens": shard_tokens}
    with _alone(unfinished):
        if not folder.exists():  # else another process was faster
            writer = _Writer(unfinished, plan)
            try:
                _tokenize(source, writer, every, n_workers or os.cpu_count())
                writer.finish(name, source)
                os.rename(writer.folder, folder)
            except BaseException as error:
                # What cannot go on is not kept: a file that must change makes it another source.
                if isinstance(error, BadDocument) or not writer.path.exists():
                    shutil.rmtree(unfinished)
                if isinstance(error, OSError):
                    raise UserError(
                        f"cannot write in {unfinished} ({error.strerror or error})\n"
                        f"make room and run again: it goes on where it was; or set DATA_DIR to another folder"
                    ) from error
                raise
        shutil.rmtree(unfinished, ignore_errors=True)
    return open_prepared(folder)


def unfinished_folder(folder: Path) -> Path:
    """Where the preparation of a folder is until it is complete."""
    return folder.with_name(f".unfinished-{folder.name}")


def read_state(unfinished: Path) -> dict:
    """How far a preparation is; empty if it has not begun."""
    try:
        return json.loads((unfinished / "state.json").read_text())
    except (FileNotFoundError, ValueError):  # not begun, or cut short with the power
        return {}


@contextmanager
def _alone(unfinished: Path) -> Iterator[None]:
    """Holds the folder for this process. The lock goes with the process, however it ends."""
    import fcntl  # not on Windows, where all other data can still be prepared

    try:
        unfinished.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write in {unfinished.parent} ({error})\nset DATA_DIR to a folder that can be written"
        ) from error
    held = os.open(unfinished, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another process is preparing {unfinished}: wait until it is done") from None
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
    """The parts in blocks of about BLOCK bytes; n_parts: how many came before."""
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
                f"ask for the same, or delete {unfinished} to start anew"
            )
        self.files = {}
        try:
            self._cut_off()
        except (OSError, ValueError) as error:
            if self.state:
                print(f"{unfinished} cannot be continued ({error}): from the start", file=sys.stderr)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            self.state = {
                "format": formats.DATA,
                "plan": plan,
                "place": (0, 0),
                "parts": 0,
                "tokens": dict.fromkeys(SPLITS, 0),
                "bytes": dict.fromkeys(SPLITS, 0),
                "shards": {},  # those that are complete: tokens and sha256 by name
                "seen": {},  # what `check` compares, by name
            }
            self._cut_off()
        self.saved_at = time.monotonic()

    def _cut_off(self) -> None:
        """Opens each split's last shard to go on at the state's token.

        ValueError if there is no state, or the files do not go with it.
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
            known[name] = seen(path)  # another one where the folder was copied
        for path in self.folder.iterdir():
            if path.name not in expected:
                path.unlink()

    def add(self, split: str, tokens: np.ndarray, n_bytes: int) -> None:
        """Appends tokens; a full shard is closed and the next one begun."""
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
        """Everything so far is on the disk, then the state that says so."""
        for file in self.files.values():
            os.fsync(file.fileno())
        files.write(self.path, json.dumps(self.state).encode())
        self.saved_at = time.monotonic()

    def finish(self, name: str, source: Source) -> None:
        """Closes the last shards and writes meta.json."""
        state = self.state
        if min(state["tokens"].values()) < 2:  # an input and its target
            raise BadDocument(
                f"{source.where} has {state['parts']:,} documents: too few for training and held-out ones\n"
                f"one of each {state['plan']['every']:,} is held out: use more"
            )
        failure = without_text(source.where, state["bytes"])
        if failure:
            raise BadDocument(failure)
        for split in SPLITS:
            if state["tokens"][split] % self.shard_tokens:
                self._close(split)
            else:  # the shard before ended with the last token
                os.unlink(self.files.pop(split).name)
        meta = {
            "format": formats.DATA,
            "name": name,
            "tokenizer": GPT2Tokenizer.name,
            "vocab_size": GPT2Tokenizer.vocab_size,
            "dtype": "uint16",
            "tokens": state["tokens"],
            "bytes": state["bytes"],  # for bits per byte: of the texts, without what stands between them
            "source": source.where,
            "held_out": f"1 of {state['plan']['every']} documents, seed {HELD_OUT_SEED}",
            "shards": dict(sorted(state["shards"].items())),
        }
        (self.folder / "checked.json").write_text(json.dumps(state["seen"], indent=2) + "\n")
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def without_text(where: str, n_bytes: dict[str, int]) -> str:
    """The error where all documents of a split are empty, else an empty string."""
    if all(n_bytes[split] for split in SPLITS):
        return ""
    if not any(n_bytes.values()):
        return f"all documents of {where} are empty\nuse documents with text"
    which = "held out for validation" if n_bytes["train"] else "for training"
    return f"all documents of {where} {which} are empty\nuse more documents with text"


def _to_extend(path: Path) -> BinaryIO:
    return open(path, "ab", buffering=0)


class _Report:
    """Progress on stderr: a live line, or a line now and then; a context manager."""

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
            self.console.print(f"going on after {self.tokens_before:,} tokens")

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *exception):
        self.progress.stop()

    def update(self, done: int, tokens: dict[str, int]) -> None:
        """done: bytes of the source's files; tokens: by split."""
        now = time.monotonic()
        n_tokens, seconds = sum(tokens.values()), max(now - self.started, 1e-9)
        report = f"{n_tokens:,} tokens  {(n_tokens - self.tokens_before) / seconds:,.0f} tokens/s"
        if self.done_before is None:  # speed is counted from here on, not from a killed run's beginning
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
    """Opens a prepared folder. UserError names a shard that is missing, truncated or changed."""
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
    if without:  # prepared when that was not refused yet
        raise UserError(without)
    check(folder, meta["shards"])
    train, val = (Shards([folder / name for name in names[split]]) for split in SPLITS)
    return Dataset(meta["name"], folder, meta, train, val, GPT2Tokenizer())
