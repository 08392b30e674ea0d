"""Tables in Markdown."""

from collections.abc import Iterable


def table(heads: list[str], rows: Iterable[list]) -> str:
    """The table with a line for the heads and one for each row; None is shown as a dash."""
    lines = [line(heads), "|---" * len(heads) + "|", *map(line, rows)]
    return "\n".join(lines)


def line(cells: list) -> str:
    """A line of a table. An empty cell is one space wide."""
    shown = ("–" if cell is None else str(cell).replace("|", r"\|") for cell in cells)
    return "|" + "|".join(f" {text} " if text else " " for text in shown) + "|"
