"""The diffs between stages: as git prints them, counted, and side by side in colour for the terminal."""

import difflib
import io
import keyword
import subprocess
import tokenize

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from lab import stages
from lab.errors import UserError

CONTEXT = 3  # unchanged lines shown around a change
SIDE_BY_SIDE_WIDTH = 120  # characters: in a narrower console lines of code would be broken


def diff(name: str) -> str:
    """The diff of a stage from the stage before, as git prints it."""
    return git_diff(file(origin(name)), file(name))


def origin(name: str) -> str | None:
    """The stage that a stage is read as a diff from: the one before it in the course, None for the first.

    For a relative or a variant it is the stage of the course from which it differs in the fewest lines.
    """
    course = stages.course()
    if name in course:
        return course[course.index(name) - 1] if name != course[0] else None
    return min(course, key=lambda stage: sum(changed_lines(stage, name)))


def changed_lines(before: str, after: str) -> tuple[int, int]:
    """Lines that one stage adds to another, and lines that it removes."""
    counted = git_diff("--numstat", file(before), file(after))
    added, removed, _ = counted.split(maxsplit=2) if counted else (0, 0, "")
    return int(added), int(removed)


def file(name: str) -> str:
    """The file of a stage, from the top of the repository."""
    return str(stages.path(name).relative_to(stages.ROOT))


def git_diff(*arguments: str) -> str:
    """What `git diff --no-index` says of two files of the repository."""
    command = ["git", "-c", "core.abbrev=7", "diff", "--no-index", "--no-color", "--no-ext-diff", *arguments]
    try:
        return subprocess.run(command, cwd=stages.ROOT, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise UserError("git is not installed, which counts the changed lines: apt install git") from None


def show(first: str, second: str, console: Console) -> None:
    """Prints the diff of two stages, with the lines and names that changed counted.

    It is side by side where the console is wide enough, and unified elsewhere.
    """
    before, after = (source(name) for name in (first, second))
    if console.width < SIDE_BY_SIDE_WIDTH:
        unified = git_diff(file(first), file(second))
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
    """The rows of one block of the diff; a line of one side without a partner stands beside nothing."""
    for i in range(max(left[1] - left[0], right[1] - right[0])):
        row = []
        for lines, (start, end), style in ((before, left, "red"), (after, right, "green")):
            there = start + i < end
            row.append(str(start + i + 1) if there else "")
            row.append(Text(lines[start + i] if there else "", style="" if kind == "equal" else style))
        table.add_row(*row)


def summary(before: list[str], after: list[str]) -> str:
    """How many lines and names came and went, and which names."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    changes = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    removed = sum(a_end - a for _, a, a_end, _, _ in changes)
    added = sum(b_end - b for _, _, _, b, b_end in changes)
    old, new = names(before), names(after)
    came, went = sorted(new - old), sorted(old - new)
    lines = [f"{added} lines added, {removed} removed; {len(came)} names came, {len(went)} went"]
    if came:
        lines.append(f"came: {', '.join(came)}")
    if went:
        lines.append(f"went: {', '.join(went)}")
    return "\n".join(lines)


def names(lines: list[str]) -> set[str]:
    """The names that a source uses, without Python's own words."""
    tokens = tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline)
    return {t.string for t in tokens if t.type == tokenize.NAME and not keyword.iskeyword(t.string)}
