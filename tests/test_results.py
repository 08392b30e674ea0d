"""What is published was measured with committed code, and the ladder with one commit."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import stages
from lab.pages import lessons

FOLDER = stages.ROOT / "results"


def commits(measured) -> Iterator[str]:
    """All commits that a part of a JSON file names."""
    if isinstance(measured, dict):
        if "commit" in measured:
            yield measured["commit"]
        measured = list(measured.values())
    if isinstance(measured, list):
        for part in measured:
            yield from commits(part)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.json")), ids=lambda path: path.name)
def test_everything_was_measured_with_committed_code(path: Path):
    measured = json.loads(path.read_text())
    assert not {part for part, value in measured.items() if any("-dirty" in c for c in commits(value))}


def test_the_ladder_was_trained_and_timed_with_one_commit():
    results = lessons.read_results()
    assert set(results["stages"]) == set(stages.course())
    assert len(set(commits([results["stages"], results["speeds"]]))) == 1


def test_every_idea_names_its_commit():
    for path in lessons.IDEAS.glob("*.json"):
        assert list(commits(json.loads(path.read_text()))), path.name
