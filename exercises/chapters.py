"""All chapters, in order. A chapter's exercises are in one file, and its name is in one line below."""

import difflib
import importlib
from pathlib import Path

from exercises.units import Chapter, Exercise
from lab.errors import UserError

STAGES = ("stage0", "stage1", "stage2", "stage3", "stage4", "stage5", "stage6", "stage7")
FILES = (*STAGES, "quantization", "serving")
CHAPTERS: list[Chapter] = [importlib.import_module(f"exercises.{file}").CHAPTER for file in FILES]


def find(wanted: str) -> tuple[Chapter, Exercise | None]:
    """The chapter given as 4, stage4 or quantization, or the chapter and the exercise given as 4.2."""
    given = wanted.strip().lower().removesuffix(".py").removeprefix("my/")
    for chapter in CHAPTERS:
        folder = Path(chapter.source).parent.name
        if given in (chapter.number, chapter.name, f"stage{chapter.number}", folder):
            return chapter, None
        for exercise in chapter.exercises:
            if given == exercise.number:
                return chapter, exercise
    known = [c.number for c in CHAPTERS] + [c.name for c in CHAPTERS]
    known += [e.number for c in CHAPTERS for e in c.exercises]
    close = difflib.get_close_matches(given, known, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    listed = ", ".join(f"{chapter.number} ({chapter.title})" for chapter in CHAPTERS)
    raise UserError(f"there is no exercise {wanted!r}; {guess}The chapters are: {listed}")
