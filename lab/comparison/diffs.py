"""Diffs between stages: as git prints them, counted, and side by side in colour in the terminal."""

import difflib
import io
import keyword
import subprocess
import sys
import tokenize

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from lab import stages
from lab.errors import UserError

CONTEXT = 3  # unchanged lines shown around a change
SIDE_BY_SIDE_WIDTH = 120  # characters; in a narrower console lines of code would wrap


def diff(name: str) -> str:
    """The diff from the previous stage to this one, as git prints it."""
    return git_diff(file(origin(name)), file(name))


def origin(name: str) -> str | None:
    """The stage that a stage is compared with: the previous one in the course, or None for the first.

    A relative or a variant is compared with the course's stage from which it differs in the fewest lines.
    """
    course = stages.course()
    if name in course:
        return course[course.index(name) - 1] if name != course[0] else None
    return min(course, key=lambda stage: sum(changed_lines(stage, name)))


def changed_lines(before: str, after: str) -> tuple[int, int]:
    """How many lines are added and how many removed from one stage to the other."""
    numbers = git_diff("--numstat", file(before), file(after))
    added, removed, _ = numbers.split(maxsplit=2) if numbers else (0, 0, "")
    return int(added), int(removed)


def file(name: str) -> str:
    """The file of a stage, from the top of the repository."""
    return str(stages.path(name).relative_to(stages.ROOT))


def git_diff(*arguments: str) -> str:
    """The output of `git diff --no-index` with these arguments, in the repository's root."""
    command = ["git", "-c", "core.abbrev=7", "diff", "--no-index", "--no-color", "--no-ext-diff", *arguments]
    try:
        return subprocess.run(command, cwd=stages.ROOT, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise UserError("git, which counts the changed lines, is not installed: apt install git") from None


def show(first: str, second: str, console: Console) -> None:
    """Prints the diff of two stages, and a summary of the changed lines and names.

    The diff is side by side if the console is wide enough, else unified. A file or a pipe gets what git
    prints, which is a valid patch; the summary then goes to stderr.
    """
    before, after = (source(name) for name in (first, second))
    unified = git_diff(file(first), file(second))
    if not console.is_terminal:
        console.file.write(unified)
        print(summary(before, after), file=sys.stderr)
        return
    if console.width < SIDE_BY_SIDE_WIDTH:
        console.print(Syntax(unified, "diff", theme="ansi_dark", background_color="default", word_wrap=True))
        console.print(summary(before, after), highlight=False)
        return
    table = Table(box=None, padding=(0, 1), expand=True, show_edge=False)
    for title in (first, second):
        table.add_column("", justify="right", style="dim", width=4)
        table.add_column(title, ratio=1, overflow="fold")
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for number, group in enumerate(matcher.get_grouped_opcodes(CONTEXT)):
        if number:
            table.add_row("", Text("⋯", style="dim"), "", Text("⋯", style="dim"))
        for kind, a, a_end, b, b_end in group:
            add_rows(table, kind, before, (a, a_end), after, (b, b_end))
    console.print(table)
    console.print(summary(before, after), highlight=False)


def source(name: str) -> list[str]:
    """The lines of a stage's code."""
    return stages.path(name).read_text(encoding="utf-8").splitlines()


def add_rows(table: Table, kind: str, before: list[str], left: tuple, after: list[str], right: tuple) -> None:
    """Adds the rows of one block of the diff; a line without a counterpart gets an empty cell beside it."""
    for i in range(max(left[1] - left[0], right[1] - right[0])):
        row = []
        for lines, (start, end), style in ((before, left, "red"), (after, right, "green")):
            exists = start + i < end
            row.append(str(start + i + 1) if exists else "")
            row.append(Text(lines[start + i] if exists else "", style="" if kind == "equal" else style))
        table.add_row(*row)


def summary(before: list[str], after: list[str]) -> str:
    """How many lines and names were added and removed, and which names."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    changes = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    removed = sum(a_end - a for _, a, a_end, _, _ in changes)
    added = sum(b_end - b for _, _, _, b, b_end in changes)
    old, new = names(before), names(after)
    gained, lost = sorted(new - old), sorted(old - new)
    lines = [
        f"{counted(added, 'line')} added, {removed} removed; "
        f"{counted(len(gained), 'name')} added, {len(lost)} removed"
    ]
    if gained:
        lines.append(f"added names: {', '.join(gained)}")
    if lost:
        lines.append(f"removed names: {', '.join(lost)}")
    return "\n".join(lines)


def counted(number: int, what: str) -> str:
    """A number of things, as in "1 line" or "3 lines"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def names(lines: list[str]) -> set[str]:
    """The names that a source uses, without Python's keywords."""
    tokens = tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline)
    return {t.string for t in tokens if t.type == tokenize.NAME and not keyword.iskeyword(t.string)}
