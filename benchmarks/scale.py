"""Computes what larger models need, on PyTorch's meta device: python -m benchmarks.scale

Writes the section "scale" of results/results.json; afterwards `python -m lab.pages.lessons` writes the tables
into docs/scale.md. Takes about a minute. The figures depend only on the code, not on the machine.
"""

from lab import cli
from lab.pages import lessons, planning
from lab.storage import runs


def main():
    plans = planning.all_plans()
    runs.write_json(lessons.RESULTS, lessons.read_results() | {"scale": plans})


if __name__ == "__main__":
    cli.run(main)
