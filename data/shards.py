"""Token files that are one sequence, and the check that they are still what was prepared."""

import hashlib
import json
from pathlib import Path

import numpy as np

from data import files
from lab.errors import UserError


class Shards:
    """Token files as one sequence, by memory map: len(tokens) and tokens[start:stop], uint16.

    As with the memory map of one file, only what is asked for is read. A slice that lies in one shard is a
    view, another a copy.
    """

    dtype = np.dtype(np.uint16)

    def __init__(self, paths: list[Path]):
        # as plain arrays, whose slices are made three times as fast as those of a memmap
        self.maps = [np.asarray(np.memmap(path, dtype=np.uint16, mode="r")) for path in paths]
        self.ends = np.cumsum([len(tokens) for tokens in self.maps])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice of shards has a step of 1, not {step}")
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
    """UserError if a shard is missing, has another size, or another sha256 than meta.json says.

    To hash 18 GB takes a minute, so that is done only for files whose size or times (of the last change of
    content and of the last change of any kind) are not those of the last check, which checked.json keeps.
    A change that leaves all of these as they were, as a failing disk makes it, stays unseen: to have
    everything hashed, delete checked.json.
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
        except UserError:  # a folder that is only to be read: hashed again next time
            files.say(f"{folder} cannot be written: its shards are hashed at every start")


def _last_check(folder: Path) -> dict:
    try:
        found = json.loads((folder / "checked.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"the shard {path.name} of {path.parent} {what}\n"
        f"copy that file from where it is whole, or delete the folder and prepare the data again"
    )


def seen(path: Path) -> list[int]:
    """Size and times of a file, which change when it does."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
