"""What a learner has done, in my/progress.json, and the learner's files."""

import ast
import itertools
import json
from pathlib import Path

from exercises import cut
from exercises.diagnose import PASSED
from exercises.units import BEYOND, Chapter, Exercise
from lab import atomic, stages
from lab.errors import UserError, shown

FORMAT = 1


def read() -> dict:
    """By exercise: its state, the number of checks, the hints seen, and whether the solution was shown."""
    path = stages.MY / "progress.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        made_by, exercises = content["format"], content["exercises"]
        usable = isinstance(exercises, dict) and all(isinstance(e, dict) for e in exercises.values())
    except (ValueError, KeyError, TypeError):
        usable = False
    if not usable:
        raise UserError(f"{shown(path)} is damaged: delete it to count anew; your code in my/ is not touched")
    if made_by > FORMAT:
        raise UserError(f"{shown(path)} was written by a newer version of the course: update it")
    return exercises


def of(number: str) -> dict:
    return read().get(number, {})


def note(number: str, **values) -> None:
    """Changes what is stored about an exercise. The file is replaced as a whole, or not at all."""
    exercises = read()
    exercises[number] = exercises.get(number, {}) | values
    content = json.dumps({"format": FORMAT, "exercises": exercises}, indent=1, sort_keys=True) + "\n"
    atomic.write(stages.MY / "progress.json", content.encode())


def note_check(number: str, state: str) -> None:
    """Counts a check. What has passed stays passed."""
    before = of(number)
    if before.get("state") != PASSED:
        note(number, state=state, checks=before.get("checks", 0) + 1)


def file(chapter: Chapter, exercise: Exercise | None = None) -> Path:
    """The learner's file for an exercise, or a chapter's first."""
    return stages.MY / chapter.file(chapter.source_of(exercise) if exercise else chapter.source)


def next_exercise(chapter: Chapter) -> Exercise | None:
    """The chapter's first exercise that has not passed; None if all have."""
    done = read()
    for exercise in chapter.exercises:
        if done.get(exercise.number, {}).get("state") != PASSED:
            return exercise
    return None


def text_to_start_with(chapter: Chapter, source: str, whole: bool) -> str:
    """What `start` writes for a source: the course's file with blanks, or the file of the stage before.

    There is none before the first stage: `whole` then blanks all its functions.
    """
    exercises = chapter.exercises_of(source)
    reference = chapter.reference(source)
    if whole and not chapter.before:
        return cut.blank(reference, dict.fromkeys(cut.functions(ast.parse(reference)), chapter.number))
    functions = [name for exercise in exercises for name in exercise.functions]
    numbers = {f: ", ".join(e.number for e in exercises if f in e.functions) for f in functions}
    blanked = cut.blank(reference, numbers)
    if not (whole and source == chapter.source):
        return blanked
    before = (stages.ROOT / chapter.before).read_text(encoding="utf-8")
    _, beyond, functions = blanked.partition(BEYOND)
    return before + beyond + functions


def start(chapter: Chapter, whole: bool, again: bool) -> list[Path]:
    """Writes the learner's files of a chapter; returns those written, and the backups of earlier ones.

    Raises UserError if there is a file already, unless `again` is set: then it is kept in my/backups.
    """
    if whole and not chapter.whole:
        raise UserError(f"{chapter.title} is not a stage: leave out --whole")
    sources = chapter.sources[:1] if whole else chapter.sources
    texts = {
        stages.MY / chapter.file(source): text_to_start_with(chapter, source, whole) for source in sources
    }
    existing = [path for path in texts if path.exists()]
    if len(existing) == len(texts) and not again:
        raise UserError(
            f"{' and '.join(map(shown, existing))} is there: python exercise.py check {chapter.number}\n"
            f"to begin anew: python exercise.py start {chapter.number} --again (keeps a copy in my/backups)"
        )
    written = texts if again else [path for path in texts if path not in existing]
    backups = [copy for path in written if (copy := keep(path))]
    for path in written:
        atomic.write(path, texts[path].encode())
    return [*written, *backups]


def keep(path: Path) -> Path | None:
    """Copies a file to my/backups under a new name, if it exists; returns the copy."""
    if not path.exists():
        return None
    numbers = (stages.MY / "backups" / f"{path.stem}-{i}.py" for i in itertools.count(1))
    backup = next(copy for copy in numbers if not copy.exists())
    atomic.write(backup, path.read_bytes())
    return backup
