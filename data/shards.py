"""Reads several token files as one sequence, and verifies that they have not changed."""

import hashlib
import json
from pathlib import Path

import numpy as np

from data import files
from lab.errors import UserError


class Shards:
    """Memory-maps several token files as one uint16 sequence, with len(tokens) and tokens[start:stop].

    As with the memory map of a single file, only the requested tokens are read. A slice within one shard is a
    view; a slice across shards is a copy.
    """

    dtype = np.dtype(np.uint16)

    def __init__(self, paths: list[Path]):
        # plain arrays: slicing them is three times as fast as slicing a memmap
        self.maps = [np.asarray(np.memmap(path, dtype=np.uint16, mode="r")) for path in paths]
        self.ends = np.cumsum([len(tokens) for tokens in self.maps])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"slices of shards must have step 1, not {step}")
        number = int(np.searchsorted(self.ends, start, side="right"))
        found = []
        while start < stop:
            before = int(self.ends[number]) - len(self.maps[number])
            found.append(self.maps[number][start - before : stop - before])
            start = int(self.ends[number])
            number += 1
        if not found:
            return np.empty(0, self.dtype)
        return found[0] if len(found) == 1 else np.concatenate(found)


def check(folder: Path, shards: dict[str, dict]) -> None:
    """Raises UserError if a shard is missing, or its size or sha256 differs from meta.json.

    Hashing 18 GB takes a minute, so a file is hashed only if its size, mtime or ctime has changed since the
    last check, which checked.json records. Corruption that changes none of them, such as by a failing disk,
    is not detected: delete checked.json to hash everything.
    """
    known = _last_check(folder)
    now = {}
    for name, shard in shards.items():
        path = folder / name
        try:
            now[name] = seen(path)
            if now[name][0] != 2 * shard["tokens"]:
                raise ValueError(f"has {now[name][0]:,} bytes, not {2 * shard['tokens']:,}")
            if now[name] != known.get(name):
                found = sha256_of_file(path)
                if found != shard["sha256"]:
                    raise ValueError(f"has changed: its sha256 is {found[:8]}…, not {shard['sha256'][:8]}…")
        except FileNotFoundError:
            raise _damaged(path, "is missing") from None
        except OSError as error:
            raise _damaged(path, f"cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise _damaged(path, str(error)) from None
    if now != known:
        try:
            files.write(folder / "checked.json", (json.dumps(now, indent=2) + "\n").encode())
        except UserError:  # a read-only folder: hash again next time
            files.say(f"{folder} is not writable: its shards will be hashed at every start")


def _last_check(folder: Path) -> dict:
    try:
        found = json.loads((folder / "checked.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"the shard {path.name} of {path.parent} {what}\n"
        f"restore that file from an intact copy, or delete the folder and prepare the data again"
    )


def seen(path: Path) -> list[int]:
    """A file's size, mtime and ctime, to detect changes."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
