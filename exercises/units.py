"""What an exercise consists of: plain data. A chapter holds the exercises of one stage."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType

from lab import stages

BEYOND = "\n\n# Not part of the stage: functions for the exercises.\n\n\n"
"""Comes before the functions that are not part of a stage's file."""
Patch = tuple[str, str]
"""Source text and its replacement. The text occurs exactly once in the functions of the exercise."""
Probe = Callable[[ModuleType], dict]
"""Runs a module on inputs where mistakes matter; returns tensors, numbers and strings by name."""


@dataclass(frozen=True)
class Mistake:
    """A wrong solution, made by patching the right one, and what to tell a learner who computes the same."""

    name: str
    """Unique in its exercise; for tests and `hunt`, never shown before the mistake is solved."""
    patches: tuple[Patch, ...]
    observed: str
    """What the numbers show."""
    why: str
    """Why it matters."""
    look: str
    """Where to look. It names a place, and holds no code."""


@dataclass(frozen=True)
class Rewrite:
    """A solution in another style: correct, or with one known mistake."""

    name: str
    code: str | tuple[Patch, ...]
    """The functions as source text (a method inside its class), or patches of the right solution."""
    mistake: str = ""
    """The name of the mistake that must be diagnosed; empty if the rewrite is correct."""


@dataclass(frozen=True)
class Exercise:
    number: str
    """Such as 4.2."""
    title: str
    minutes: int
    functions: tuple[str, ...]
    """The functions to write, such as attention or KVCache.__init__."""
    question: str
    """The first hint: a question that leads to the idea."""
    shapes: str
    """The second hint: the formula, and the shapes."""
    steps: str
    """The third hint: the steps in words. (The fourth is the solution.)"""
    probes: tuple[Probe, ...]
    mistakes: tuple[Mistake, ...]
    rewrites: tuple[Rewrite, ...]
    properties: dict[str, Callable[[ModuleType], bool]] = field(default_factory=dict)
    """What holds for a right solution, in words. Shown for a wrong one that matches no known mistake."""
    source: str = ""
    """The file with the functions, from the root of the course. Empty: the chapter's."""
    afterwards: str = ""
    """Said after passing: what the exercise was about, in a sentence or two."""


@dataclass(frozen=True)
class Question:
    """A number, or a choice, to predict before it is computed."""

    text: str
    answer: Callable[[], float | str]
    """Computes the answer. A string is one of `choices`."""
    because: str
    """Said after the answer. {answer} stands for it."""
    choices: tuple[str, ...] = ()
    tolerance: float = 0.0
    """How far a number may be off, relative to the answer."""


@dataclass(frozen=True)
class Chapter:
    """The exercises of a stage, or of another part of the course."""

    number: str
    """Such as 4; quantization and serving come after the last stage."""
    name: str
    """The learner's file is my/NAME.py."""
    title: str
    source: str
    """The file of the course that the learner's file is made from."""
    exercises: tuple[Exercise, ...]
    questions: tuple[Question, ...] = ()
    beyond: str = ""
    """A file with functions that are not part of the stage. They are added to the learner's file."""
    before: str = ""
    """The file of the stage before, which `start --whole` begins with."""
    whole: Exercise | None = None
    """The whole file as one exercise, with the chapter's number and no functions of its own. Its mistakes
    are in functions that no other exercise has, and their text occurs exactly once in the source."""

    def __post_init__(self):
        numbers = [exercise.number for exercise in self.exercises]
        assert numbers == [f"{self.number}.{i + 1}" for i in range(len(numbers))]

    @cached_property
    def sources(self) -> list[str]:
        """The files of the course that the exercises come from; the chapter's own is the first."""
        return list(dict.fromkeys([self.source, *(e.source or self.source for e in self.exercises)]))

    def file(self, source: str) -> str:
        """The name of the learner's file for a source: stage5.py, or stage5_tiled.py for another source."""
        other = "" if source == self.source else f"_{Path(source).stem}"
        return f"{self.name}{other}.py"

    def source_of(self, exercise: Exercise) -> str:
        return exercise.source or self.source

    def exercises_of(self, source: str) -> list[Exercise]:
        return [exercise for exercise in self.exercises if self.source_of(exercise) == source]

    def reference(self, source: str) -> str:
        """The text of a source; the functions beyond the stage follow its own source."""
        text = (stages.ROOT / source).read_text(encoding="utf-8")
        if source == self.source and self.beyond:
            beyond = (stages.ROOT / self.beyond).read_text(encoding="utf-8")
            text += BEYOND + beyond[beyond.index("\ndef ") + 1 :]
        return text
