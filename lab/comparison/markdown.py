"""Tables in Markdown."""

from collections.abc import Iterable


def table(heads: list[str], rows: Iterable[list]) -> str:
    """A table with these headings and rows; None is shown as a dash."""
    lines = [line(heads), "|---" * len(heads) + "|", *map(line, rows)]
    return "\n".join(lines)


def line(cells: list) -> str:
    """A line of a table. An empty cell is one space wide."""
    shown = ("–" if cell is None else str(cell).replace("|", r"\|") for cell in cells)
    return "|" + "|".join(f" {text} " if text else " " for text in shown) + "|"
