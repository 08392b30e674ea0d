"""What a user is told: errors that can be mended, and paths."""

from pathlib import Path


class UserError(Exception):
    """Something the user can mend: one or two lines with the value and the remedy.

    The drivers print it on stderr and exit with status 2, without a traceback.
    """


def shown(path: Path) -> str:
    """The path as short as it can be said from the working directory."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
