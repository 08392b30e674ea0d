"""Lists all runs, newest first: python runs.py

For each run, it shows the stage and the data, the differences from the preset, the step, the best validation
loss, and whether the stage's code has changed since. python compare.py --runs A B compares runs.
"""

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # first, since importing torch takes seconds

import sys
from dataclasses import dataclass

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from lab import cli, stages
from lab.comparison import overview
from lab.errors import UserError, shown
from lab.storage import runs

HEADS = ("run", "stage", "data", "preset and differences from it", "step", "best val loss", "when", "code")


@dataclass
class Settings:
    """Lists all runs, newest first."""

    stage: str | None = None
    """List only runs of this stage: its number or name. None: all."""


def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    stage = stages.find(settings.stage) if settings.stage else None
    rows, unreadable = [], []
    for folder in sorted(runs.folders(), key=overview.last_change, reverse=True):
        try:
            if stage in (None, runs.read_config(folder)["stage"]):
                rows.append(overview.row(folder))
        except (UserError, KeyError, TypeError, ValueError) as error:
            unreadable.append(f"left out: {shown(folder)}: {error}")
    if not rows:
        of_stage = f" of {stage}" if stage else ""
        command = f"python train.py --stage {settings.stage or 0}"
        print(f"there is no run{of_stage} in {shown(runs.RUNS)}; train one: {command}")
    else:
        show(rows)
    for line in unreadable:
        print(line, file=sys.stderr)


def show(rows: list[list[str]]) -> None:
    """Prints two lines per run in a terminal; into a pipe one line per run, with tabs between the cells."""
    if not sys.stdout.isatty():
        for row in [HEADS, *rows]:
            print("\t".join(row))
        return
    console = Console(highlight=False)
    for run, stage, data, changed, step, loss, when, code in rows:
        console.print(run, style="bold", markup=False)
        said = f"{stage} on {data}: {changed}; step {step}; best val loss {loss}; {when}; {code} code"
        console.print(Padding(Text(said), (0, 0, 0, 4)))


if __name__ == "__main__":
    cli.run(main)
