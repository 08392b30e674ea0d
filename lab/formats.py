"""Format numbers of the files that we write, and the check that refuses newer ones.

A file without a number has format 1. Raise a number when older code can no longer read the file, or newer
code must read it differently; the reader then accepts the older numbers or refuses them with a message.
"""

from lab.errors import UserError

# Runs: config.json, the checkpoints, metrics.jsonl. Format 2: config.json has the hash of the code, and
# state.pt the generators of all processes as "rngs" (early files of format 1 have one process's "rng").
RUN = 2
# Prepared data: meta.json, its token files, and state.json of an unfinished preparation. Formats 1 and 2 have
# the same layout.
DATA = 2
# results.json and speeds.json. Format 2: keyed by the stage's folder instead of its number; with the hash of
# its code.
RESULTS = 2


def check(found: dict, newest: int, what: str) -> None:
    """Raises UserError if the content of a file (named `what`) has a newer format than this code reads."""
    number = found.get("format", 1) if isinstance(found, dict) else 1
    if not isinstance(number, int) or number > newest:
        raise UserError(
            f"{what} has format {number}, but this version only reads formats up to {newest}\n"
            "a newer version wrote it: update this one"
        )
