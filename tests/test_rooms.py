"""Imports run one way between the rooms, as in the picture in CONTRIBUTING.md; no module is installed."""

import ast
import subprocess
from pathlib import Path

from lab import stages

ROOT = stages.ROOT
ROOMS = ("lab", "data", "lab/storage", "lab/training", "lab/sampling", "lab/comparison", "lab/pages")
# Each room and the rooms that it may import from.
ALLOWED = {
    "lab": set(),
    "data": {"lab"},
    "lab/storage": {"lab", "data"},
    "lab/training": {"lab", "data", "lab/storage"},
    "lab/sampling": {"lab"},
    "lab/comparison": {"lab", "data", "lab/storage", "lab/training", "lab/sampling"},
    "lab/pages": {
        "lab",
        "data",
        "lab/storage",
        "lab/training",
        "lab/sampling",
        "lab/comparison",
        "exercises",
    },
    "lab/pages/figures": {*ROOMS, "deploy"},
    "lab/pages/site": {*ROOMS, "exercises"},
    "deploy": set(ROOMS),
    "benchmarks": {*ROOMS, "deploy"},
    "exercises": {*ROOMS, "deploy"},
}


def files():
    """The tracked Python files of the rooms, each with its room."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    for path in map(Path, listed.stdout.split()):
        room = path.parent.as_posix()
        if room in ALLOWED:
            yield path, room


def imported(path):
    """The modules of ours that a file imports, as paths without .py."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            package = Path(*node.module.split("."))
            for alias in node.names:
                inner = package / alias.name
                yield inner if (ROOT / inner).is_dir() or (ROOT / f"{inner}.py").exists() else package
        elif isinstance(node, ast.Import):
            yield from (Path(*alias.name.split(".")) for alias in node.names)


def test_imports_run_one_way_between_the_rooms():
    found = []
    for path, room in files():
        for module in imported(path):
            other = module.as_posix() if (ROOT / module).is_dir() else module.parent.as_posix()
            if other in ALLOWED and other != room and other not in ALLOWED[room]:
                found.append(f"{path} imports {module}")
    assert not found


def test_no_room_has_more_than_a_dozen_files():
    rooms = [room for path, room in files() if path.name != "__init__.py" and room.startswith("lab")]
    assert max(map(rooms.count, rooms)) <= 12


def test_every_module_is_in_the_map():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = [path for path, room in files() if not path.name.startswith("__") and room.startswith(ROOMS)]
    assert [str(path) for path in named if path.name not in text] == []


def test_the_distribution_installs_no_module():
    """Nothing under names like data and lab, which other projects have too."""
    project = (ROOT / "pyproject.toml").read_text()
    assert "\npackages = []\n" in project and "py-modules" not in project
