"""The numbers that say how our files are laid out, and what happens to a file with another number.

A file without a number is of format 1. Raise a number when older code could no longer read the file, or newer
code must read it in another way; the reader then accepts the older numbers or refuses them in a sentence.
"""

from lab.errors import UserError

# Runs: config.json, the checkpoints, metrics.jsonl. 2: config.json has the hash of the code, state.pt the
# generators of all processes ("rngs", in format 1 at first one process's "rng").
RUN = 2
# Prepared data: meta.json, its token files, and state.json of an unfinished preparation. 1 and 2 are alike.
DATA = 2
# results.json and speeds.json. 2: by the stage's folder instead of its number; with the hash of its code.
RESULTS = 2


def check(found: dict, newest: int, what: str) -> None:
    """A UserError where the content of a file (named `what`) has a format that is newer than this code."""
    number = found.get("format", 1) if isinstance(found, dict) else 1
    if not isinstance(number, int) or number > newest:
        raise UserError(
            f"{what} has format {number}, and this version reads formats up to {newest}\n"
            "it was written by a newer version: update this one"
        )
