"""Exercises with feedback: python exercise.py shows your progress and the next command.

start writes a file in my/ with blanks to fill in, check says what is wrong with an answer and why it matters,
and train.py --stage my/stage4.py trains what you wrote. exercises/README.md describes a session.
"""

from lab import terminal

if __name__ == "__main__":
    terminal.prepare()  # first, since importing torch takes seconds

import difflib
import math
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from tyro.conf import Positional, subcommand

from exercises import chapters, cut, diagnose, hunting, predictions, progress
from exercises.diagnose import PASSED, UNWRITTEN, WRONG
from exercises.units import Chapter, Exercise
from exercises.words import say
from lab import cli
from lab.errors import UserError, shown

POLL_SECONDS = 0.3
COMMANDS = ("start", "check", "watch", "hint", "solution", "hunt", "predict")


@dataclass
class Start:
    """Writes the file of a chapter in my/, with blanks to fill in."""

    what: Positional[str | None] = None
    """The chapter, such as 4. None: the one that comes next."""
    whole: bool = False
    """Begin with the file of the stage before, and write the whole diff."""
    again: bool = False
    """Begin anew; the file that is there is kept in my/backups."""


@dataclass
class Check:
    """Checks an exercise (4.2) inside the course's code, or all of a chapter and its file as a whole (4)."""

    what: Positional[str | None] = None
    """The exercise or the chapter. None: the exercise that comes next."""


@dataclass
class Watch:
    """Checks at each save an exercise (4.2), or a chapter's first that has not passed (4). Ctrl-C ends."""

    what: Positional[str | None] = None
    """The exercise or the chapter. None: the exercise that comes next."""


@dataclass
class Hint:
    """Shows the next hint: a question, then shapes and formula, then the steps."""

    what: Positional[str | None] = None
    """The exercise, such as 4.2. None: the one that comes next."""
    level: Literal[1, 2, 3] | None = None
    """Show this one. None: the next one."""


@dataclass
class Solution:
    """Shows the course's code beside yours, once the exercise has passed."""

    what: Positional[str | None] = None
    """The exercise, such as 4.2. None: the one that comes next."""
    give_up: bool = False
    """Show it before."""


@dataclass
class Hunt:
    """Hides a mistake in a model, and shows its loss and tests; the answer is a function or a line."""

    what: Positional[str | None] = None
    """The chapter, such as 4. None: the one that comes next."""
    seed: int | None = None
    """Which mistake. None: the one being hunted, or else a new one."""
    answer: str | None = None
    """Where the mistake is: a function (attention) or a line of the file (147)."""
    give_up: bool = False
    """Tell where it is."""


@dataclass
class Predict:
    """Asks for numbers before they are computed."""

    what: Positional[str | None] = None
    """The chapter, such as 4. None: the one that comes next."""


Command = (
    Annotated[Start, subcommand("start")]
    | Annotated[Check, subcommand("check")]
    | Annotated[Watch, subcommand("watch")]
    | Annotated[Hint, subcommand("hint")]
    | Annotated[Solution, subcommand("solution")]
    | Annotated[Hunt, subcommand("hunt")]
    | Annotated[Predict, subcommand("predict")]
)


def main():
    torch.set_num_threads(1)  # with tiny tensors, a second thread only slows things down
    if not sys.argv[1:]:
        show_progress()
        return
    first = sys.argv[1]
    if not first.startswith("-") and first not in COMMANDS:
        close = difflib.get_close_matches(first, COMMANDS, n=1)
        guess = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"there is no command {first!r}; {guess}The commands are: {', '.join(COMMANDS)}")
    command = cli.parse_flags(Command, sys.argv[1:])
    chapter, exercise = chapters.find(command.what or current()[1].number)
    match command:
        case Start():
            start(chapter, command.whole, command.again)
        case Check():
            feedback = check_one(chapter, exercise) if exercise else check_all(chapter)
            sys.exit(feedback.state == WRONG)
        case Watch():
            watch(chapter, exercise)
        case Hint():
            hint(exercise or chapter.whole or needed(exercise, command), command.level)
        case Solution():
            solution(chapter, needed(exercise, command), command.give_up)
        case Hunt():
            hunting.hunt(chapter, command.seed, command.answer, command.give_up)
        case Predict():
            predictions.ask(chapter)


def needed(exercise: Exercise | None, command) -> Exercise:
    """The exercise, for commands that take no chapter."""
    if exercise is None:
        raise UserError(f"{command.what} is a chapter: name an exercise of it, such as {command.what}.1")
    return exercise


# ---- progress


def show_progress() -> None:
    done, minutes_left, passed = progress.read(), 0, 0
    every = [(chapter, exercise) for chapter in chapters.CHAPTERS for exercise in parts(chapter)]
    for chapter, exercise in every:
        if exercise is parts(chapter)[0]:
            print(f"{chapter.number} {chapter.title}")
        known = done.get(exercise.number, {})
        state, hints = known.get("state", "–"), known.get("hints", 0)
        seen = f", {hints} hint{'s' if hints > 1 else ''}" if hints else ""
        print(f"    {exercise.number:<4} {exercise.title:<48} {exercise.minutes:>3} min   {state}{seen}")
        passed += state == PASSED
        minutes_left += exercise.minutes if state != PASSED else 0
    print(f"\n{passed} of {len(every)} passed; about {math.ceil(minutes_left / 60)} hours to go")
    print(f"next: {next_command()}")


def parts(chapter: Chapter) -> list[Exercise]:
    """The exercises of a chapter and its whole file."""
    return [*chapter.exercises, *([chapter.whole] if chapter.whole else [])]


def current() -> tuple[Chapter, Exercise]:
    """The first exercise that has not passed, in a chapter that has been started if there is one."""
    done = progress.read()
    every = [(chapter, exercise) for chapter in chapters.CHAPTERS for exercise in parts(chapter)]
    left = [(c, e) for c, e in every if done.get(e.number, {}).get("state") != PASSED]
    started = [(c, e) for c, e in left if progress.file(c, e).exists()]
    return (started or left or every[-1:])[0]


def next_command() -> str:
    chapter, exercise = current()
    if progress.of(exercise.number).get("state") == PASSED:
        return f"{cli.program()} hunt {chapter.number}   (all exercises have passed)"
    path = progress.file(chapter, exercise)
    if path.exists():
        return f"edit {shown(path)}, then {cli.program()} check {exercise.number}"
    return f"{cli.program()} start {chapter.number}"


# ---- start


def start(chapter: Chapter, whole: bool, again: bool) -> None:
    for path in progress.start(chapter, whole, again):
        print(f"kept {shown(path)}" if path.parent.name == "backups" else f"wrote {shown(path)}")
    if whole:
        blank = f"{chapter.source} with nothing but its docstrings, to be written"
        changed = f"{chapter.before}, to be changed into the stage on {chapter.title}"
        print(f"It is {changed if chapter.before else blank}.")
        print(f"next: edit it, then {cli.program()} check {chapter.number}")
        return
    first, last = chapter.exercises[0], chapter.exercises[-1]
    print(f"Its blanks are the exercises {first.number} to {last.number}.")
    names, file = ", ".join(first.functions), shown(progress.file(chapter, first))
    print(f"next: write {names} in {file}, then {cli.program()} check {first.number}")
    print(f"a question to begin with: {cli.program()} hint {first.number}")


# ---- check


def read_answer(chapter: Chapter, exercise: Exercise | None):
    """The learner's syntax tree and file, or the feedback that it cannot be read."""
    path = progress.file(chapter, exercise)
    if not path.exists():
        raise UserError(f"{shown(path)} does not exist yet: {cli.program()} start {chapter.number}")
    _, tree, problem = diagnose.read(path)
    return path, tree, diagnose.Feedback(WRONG, problem) if problem else None


def check_one(chapter: Chapter, exercise: Exercise) -> diagnose.Feedback:
    """Checks an exercise; prints and stores the result."""
    path, tree, problem = read_answer(chapter, exercise)
    feedback = problem or diagnose.check(chapter, exercise, tree, path)
    show(exercise, feedback)
    if feedback.state == PASSED:
        print(f"compare: {cli.program()} solution {exercise.number}")
        print(f"next: {next_command()}")
    elif feedback.state == UNWRITTEN:
        print(f"next: write it in {shown(path)}")
        print(f"a question to begin with: {cli.program()} hint {exercise.number}")
    return feedback


def show(exercise: Exercise, feedback: diagnose.Feedback, details: bool = True) -> None:
    """Prints and stores the result of a check."""
    progress.note_check(exercise.number, feedback.state)
    print(f"{exercise.number} {exercise.title}: {feedback.state}")
    for line in feedback.lines if details else []:
        say(line, "  ")
    if feedback.state == PASSED and exercise.afterwards:
        say(exercise.afterwards, "  ")


def check_all(chapter: Chapter) -> diagnose.Feedback:
    """Checks each exercise by itself, then the file as a whole; gives details of the first that fails."""
    results = []
    for exercise in chapter.exercises:
        path, tree, problem = read_answer(chapter, exercise)
        results.append((exercise, problem or diagnose.check(chapter, exercise, tree, path)))
    # A learner who writes the whole diff may give the functions other names.
    if chapter.whole and all(feedback.state == PASSED or feedback.absent for _, feedback in results):
        path, tree, _ = read_answer(chapter, None)
        results.append((chapter.whole, diagnose.check_whole(chapter, tree, path)))
    failed = next((f for _, f in results if f.state != PASSED and not f.absent), None)
    if results[-1][0] is chapter.whole and results[-1][1].state == PASSED:
        failed = None
    for exercise, feedback in results:
        if feedback.absent:
            print(f"{exercise.number} {exercise.title}: not checked alone ({feedback.lines[0]})")
        else:
            show(exercise, feedback, details=feedback is failed)
    if failed is None:
        if hunting.is_model(chapter):
            print(f"train it: python train.py --stage {shown(progress.file(chapter))}")
        print(f"next: {next_command()}")
    return failed or results[-1][1]


def watch(chapter: Chapter, exercise: Exercise | None) -> None:
    """Checks again at each save, until the exercise or the chapter has passed, or Ctrl-C."""
    seen = None
    try:
        while True:
            current = exercise or progress.next_exercise(chapter)
            if current is None:
                print(f"all have passed; next: {cli.program()} check {chapter.number}")
                return
            path = progress.file(chapter, current)
            now = (current.number, path.stat().st_mtime_ns if path.exists() else 0)
            if now != seen:
                seen = now
                print(f"\n{time.strftime('%H:%M:%S')}")
                feedback = check_one(chapter, current)
                if feedback.state == PASSED and exercise:
                    return
                sys.stdout.flush()
                continue
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print()


# ---- hints and solutions


def hint(exercise: Exercise, level: int | None) -> None:
    hints = (exercise.question, exercise.shapes, exercise.steps)
    seen = progress.of(exercise.number).get("hints", 0)
    level = level or min(seen + 1, 3)
    print(f"hint {level} of 3 for {exercise.number} {exercise.title}")
    say(hints[level - 1])
    progress.note(exercise.number, hints=max(seen, level))
    more = f"hint {exercise.number}" if level < 3 else f"solution {exercise.number} --give-up"
    print(f"more: {cli.program()} {more}")


def solution(chapter: Chapter, exercise: Exercise, give_up: bool) -> None:
    if progress.of(exercise.number).get("state") != PASSED:
        if not give_up:
            raise UserError(
                f"{exercise.number} has not passed yet: {cli.program()} hint {exercise.number}\n"
                f"to see the solution all the same: {cli.program()} solution {exercise.number} --give-up"
            )
        progress.note(exercise.number, gave_up=True)
    source = chapter.source_of(exercise)
    path, reference = progress.file(chapter, exercise), chapter.reference(source)
    text, tree, _ = diagnose.read(path) if path.exists() else ("", None, [])
    for name in exercise.functions:
        print(f"---- {name}, in {source}\n{cut.piece(reference, name)}")
        if tree and (node := cut.find(tree, name)) and not cut.is_blank(node):
            print(f"---- {name}, in {shown(path)}\n{cut.piece(text, name)}")
        print()


if __name__ == "__main__":
    cli.run(main)
