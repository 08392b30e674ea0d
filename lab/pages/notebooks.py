"""Writes notebooks/*.ipynb from the Python files beside them: python -m lab.pages.notebooks

A file in percent format is plain Python, so a diff of it can be read. `# %%` begins a cell of code, and
`# %% [markdown]` one of text, whose lines are comments. (jupytext and VS Code know this format, too.) A test
fails if a notebook is not up to date. --run FOLDER runs them all, and writes them there with their outputs.
"""

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lab import cli, optional, stages
from lab.errors import UserError

FOLDER = stages.ROOT / "notebooks"
SECONDS_EACH, SECONDS_IN_ALL = 120, 720


@dataclass
class Settings:
    """Writes notebooks/*.ipynb from the Python files beside them."""

    run: Path | None = None
    """Run all notebooks, and write them with their outputs into this folder."""


def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    for source in sources():
        source.with_suffix(".ipynb").write_text(
            notebook(source.read_text(encoding="utf-8")), encoding="utf-8"
        )
    if settings.run:
        run_all(settings.run)


def sources() -> list[Path]:
    """The notebooks' Python files, in order."""
    return sorted(FOLDER.glob("[0-9]*.py"))


def cells(source: str) -> list[tuple[str, str]]:
    """The cells of a file in percent format: "markdown" or "code", and the text."""
    found = []
    for kind, body in re.findall(
        r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", source, re.DOTALL | re.MULTILINE
    ):
        if kind:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        found.append(("markdown" if kind else "code", body.strip()))
    return found


def notebook(source: str) -> str:
    """The text of an .ipynb file: the cells of a file in percent format, without outputs."""
    nbformat = optional.load("nbformat", extra="notebooks", needed_for="writing notebooks")
    v4 = nbformat.v4
    made = v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for number, (kind, text) in enumerate(cells(source)):
        new_cell = v4.new_markdown_cell if kind == "markdown" else v4.new_code_cell
        made.cells.append(new_cell(text, id=f"cell-{number}"))  # nbformat would draw a random id
    nbformat.validate(made)
    return nbformat.writes(made) + "\n"


def run_all(folder: Path) -> None:
    """Runs every notebook; raises UserError if one fails, or takes too long."""
    nbformat = optional.load("nbformat", extra="notebooks", needed_for="--run")
    nbclient = optional.load("nbclient", extra="notebooks", needed_for="--run")
    folder.mkdir(parents=True, exist_ok=True)
    wrong, begun = [], time.monotonic()
    for path in sorted(FOLDER.glob("*.ipynb")):
        started, problem = time.monotonic(), ""
        read = nbformat.read(path, as_version=4)
        client = nbclient.NotebookClient(
            read,
            timeout=SECONDS_EACH,
            kernel_name="python3",
            resources={"metadata": {"path": str(FOLDER)}},
            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # else a warning on its sockets for each
        )
        try:
            client.execute()
        except nbclient.exceptions.CellExecutionError as error:
            problem = f"{error.ename}: {error.evalue}"
        except nbclient.exceptions.CellTimeoutError:
            problem = "a cell did not end in time"
        seconds = time.monotonic() - started
        if not problem and seconds > SECONDS_EACH:
            problem = f"at most {SECONDS_EACH} s are allowed"
        nbformat.write(read, folder / path.name)
        print(f"{path.name}: {seconds:.0f} s{f', {problem}' if problem else ''}", flush=True)
        if problem:
            wrong.append(path.name)
    seconds = time.monotonic() - begun
    if wrong:
        raise UserError(f"failed: {', '.join(wrong)}")
    if seconds > SECONDS_IN_ALL:
        raise UserError(
            f"the notebooks took {seconds:.0f} s together: at most {SECONDS_IN_ALL} s are allowed"
        )


if __name__ == "__main__":
    cli.run(main)
