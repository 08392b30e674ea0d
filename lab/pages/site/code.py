"""Source as HTML: coloured lines, names that link to their explanation, and diffs hunk by hunk."""

import ast
import functools
import re
from html import escape

from pygments import highlight, lexers
from pygments.formatters import HtmlFormatter

from exercises import cut
from exercises.units import Chapter, Exercise
from lab import stages

NAME = re.compile(r'<span class="(n|nc|nf|nb|bp)">(\w+)</span>')  # Pygments' classes for names


def coloured(text: str, language: str) -> str:
    """Code as HTML with Pygments' classes. Elements never extend over a line break."""
    lexer = lexers.get_lexer_by_name(language or "text", stripnl=False)
    return highlight(text, lexer, HtmlFormatter(nowrap=True))


@functools.cache
def lines(file: str) -> list[str]:
    """The lines of a Python file of the course, as HTML."""
    return coloured((stages.ROOT / file).read_text(encoding="utf-8"), "python").split("\n")


def solution(chapter: Chapter, exercise: Exercise) -> str:
    """The course's own code for an exercise, as HTML."""
    reference = chapter.reference(chapter.source_of(exercise))
    return coloured("\n\n".join(cut.piece(reference, name) for name in exercise.functions), "python")


def definitions(file: str) -> dict[str, tuple[int, str]]:
    """Line and first line of the docstring of each class, function and method of a file that has one.

    Names that are defined more than once, such as forward, are left out.
    """
    found, twice = {}, set()
    for node in ast.walk(ast.parse((stages.ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            if node.name in found:
                twice.add(node.name)
            found[node.name] = node.lineno, (ast.get_docstring(node) or "").partition("\n")[0]
    return {name: at for name, at in found.items() if name not in twice and at[1]}


def linked(html: str, explained: dict[str, tuple[str, str]], seen: set[str]) -> str:
    """Coloured code in which each explained name is a link where it occurs first; seen: those before."""

    def link(match: re.Match) -> str:
        name = match[2]
        if name not in explained or name in seen:
            return match[0]
        seen.add(name)
        return term(match[0], *explained[name])

    return NAME.sub(link, html)


def term(html: str, address: str, explanation: str) -> str:
    """A link to an explanation, which the page's script also shows beside it."""
    return f'<a class="term" href="{address}" data-tip="{escape(explanation)}">{html}</a>'


def files_of(diff: str) -> tuple[str, str]:
    """The two files of a diff as git prints it, from the root of the repository."""
    return re.search(r"\n--- a/(.*)\n\+\+\+ b/(.*)\n", diff).groups()


def hunks(diff: str, explained: dict[str, tuple[str, str]]) -> list[dict]:
    """The hunks of a diff: where each one is, and its blocks of lines. explained: names that become links.

    A block is unchanged lines, or lines removed and those added in their place: {"old": [(number, HTML)],
    "new": [(number, HTML)], "changed": bool}.
    """
    before, after = map(lines, files_of(diff))
    found = []
    for line in diff.splitlines():
        if match := re.match(r"@@ -(\d+)\S* \+(\d+)\S* @@ ?(.*)", line):
            old, new = int(match[1]), int(match[2])
            found.append({"where": match[3], "line": new, "blocks": []})
            seen = set()
        elif found and line[:1] in (" ", "+", "-"):
            blocks, changed = found[-1]["blocks"], line[0] != " "
            if not blocks or blocks[-1]["changed"] != changed:
                blocks.append({"old": [], "new": [], "changed": changed})
            if line[0] != "+":
                blocks[-1]["old"].append((old, before[old - 1]))
                old += 1
            if line[0] != "-":
                blocks[-1]["new"].append((new, linked(after[new - 1], explained, seen)))
                new += 1
    return found
