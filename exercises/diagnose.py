"""Tells a learner what is wrong, in this order: syntax; not written yet; an exception, with its line and the
shapes there; names, shapes and dtypes; a known mistake, or two at once; else what holds and what fails.

A known mistake is recognized by its numbers: the mistake is run on the same probes as the learner's code.
"""

import ast
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from exercises import cut, probe
from exercises.cut import OURS
from exercises.probe import TOLERANCE, Outcome
from exercises.units import Chapter, Exercise, Mistake
from lab.errors import shown

PASSED, UNWRITTEN, WRONG = "passed", "not written", "not right yet"
SECONDS_FOR_PAIRS = 2  # of this process, so that other work of the machine changes no diagnosis


@dataclass
class Feedback:
    state: str
    lines: list[str]
    """What to print, without the exercise's number."""
    mistakes: tuple[str, ...] = ()
    """The names of the mistakes that were recognized."""
    absent: bool = False
    """Whether a function of the exercise is not in the file."""


def read(path: Path) -> tuple[str, ast.Module | None, list[str]]:
    """A learner's file: its text and syntax tree, or None and what keeps it from being read as Python."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return "", None, [f"{shown(path)} is not UTF-8 text (byte {error.start}): save it as UTF-8."]
    return text, *parse(text, path)


def parse(text: str, path: Path) -> tuple[ast.Module | None, list[str]]:
    try:
        return ast.parse(text, str(path)), []
    except SyntaxError as error:
        lines = text.split("\n")
        line = lines[error.lineno - 1] if error.lineno and error.lineno <= len(lines) else ""
        place = f", line {error.lineno}" if error.lineno else ""
        told = [f"{shown(path)}{place}: {error.msg}."] + [f"    {line.strip()}"] * bool(line.strip())
        if isinstance(error, TabError) or (isinstance(error, IndentationError) and "\t" in line):
            told.append("The line is indented with tabs, the others with spaces: convert the tabs to spaces.")
        return None, told
    except ValueError as error:  # a null byte
        return None, [f"{shown(path)} cannot be read as Python: {error}."]


def check(chapter: Chapter, exercise: Exercise, tree: ast.Module, path: Path) -> Feedback:
    """Checks the functions of one exercise inside the course's code, whatever else is in the file."""
    reference = chapter.reference(chapter.source_of(exercise))
    problem = missing(exercise.functions, ast.parse(reference), tree, path)
    if problem:
        return Feedback(WRONG, problem, absent=not all(cut.find(tree, name) for name in exercise.functions))
    blanks = [name for name in exercise.functions if cut.is_blank(cut.find(tree, name))]
    if blanks:
        return unwritten(exercise, blanks)
    code = cut.merged(reference, tree, exercise.functions)
    return judge(exercise, reference, code, path)


def check_whole(chapter: Chapter, tree: ast.Module, path: Path) -> Feedback:
    """Checks the learner's file as it is: the exercises whose functions it has, and the whole model."""
    reference = chapter.reference(chapter.source)
    problem = missing_classes(ast.parse(reference), tree, path)
    if problem:
        return Feedback(WRONG, problem)
    for exercise in [*chapter.exercises_of(chapter.source), chapter.whole]:
        if all(cut.find(tree, name) for name in exercise.functions):
            feedback = judge(exercise, reference, tree, path)
            if feedback.state != PASSED:
                return feedback
    return feedback


def missing_classes(reference: ast.Module, mine: ast.Module, path: Path) -> list[str]:
    """What to say if a class that the rest of the course uses is not in the file."""
    for name in ("GPTConfig", "KVCache", "GPT"):
        if cut.find(reference, name) and not isinstance(cut.find(mine, name), ast.ClassDef):
            return [
                f"{shown(path)} has no class {name}. It may have been renamed or deleted,"
                " or the file is from another version of the course.",
                "The course's programs look for it under this name.",
            ]
    return []


def unwritten(exercise: Exercise, blanks: list[str]) -> Feedback:
    if len(blanks) < len(exercise.functions):
        return Feedback(UNWRITTEN, [f"Not written yet: {', '.join(blanks)}."])
    names = ", ".join(blanks)
    return Feedback(UNWRITTEN, [f"Not written yet, as expected at the start: {names}."])


def missing(functions, reference: ast.Module, mine: ast.Module, path: Path) -> list[str]:
    """What to say if a function is not there or has other parameters; empty if all is well."""
    for name in functions:
        node, ours = cut.find(mine, name), cut.find(reference, name)
        *outer, last = name.split(".")
        kind = f"class {outer[0]}" if outer and not cut.find(mine, outer[0]) else f"function {name}"
        if node is None:
            signature = ast.unparse(ours).split("\n")
            signature = next(line for line in signature if line.startswith("def"))
            return [
                f"{shown(path)} has no {kind}. It may have been renamed or deleted,"
                " or the file is from another version of the course.",
                f"The check looks for {last} as the course defines it: {signature}",
            ]
        if not isinstance(node, ast.FunctionDef):
            return [f"{shown(path)}, line {node.lineno}: {name} should be a function, and is a class."]
        given, wanted = cut.arguments(node), cut.arguments(ours)
        if len(given) != len(wanted) and not node.args.vararg:
            return [
                f"{shown(path)}, line {node.lineno}: {name} takes ({', '.join(given)}).",
                f"The rest of the course calls it with ({', '.join(wanted)}), so it needs these parameters.",
            ]
    return []


def judge(exercise: Exercise, reference: str, code: ast.Module | str, path: Path) -> Feedback:
    """Compares what the learner's code computes with what the course's does."""
    expected = outcome_of(exercise, reference)
    try:
        with probe.time_limit():
            module = probe.load(code, str(path))
            got = probe.run(exercise.probes, module)
    except probe.TooSlow as error:
        raised = probe.describe(error.__cause__, str(path))
        where = f"line {raised.line}, in {raised.function}" if raised.line else "the course's code"
        message = f"It still ran after {probe.SECONDS} seconds and was stopped in {where}."
        return Feedback(WRONG, [message, "These inputs are tiny. Is there a loop that never ends?"])
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # while the file was loaded
        return Feedback(WRONG, exception(probe.describe(error, str(path)), path, ""))
    if probe.distance(got, expected) <= TOLERANCE:
        return Feedback(PASSED, [])

    unexpected = [raised for name, raised in got.raised.items() if name not in expected.raised]
    if unexpected and unexpected[0].type == "NotImplementedError":
        return Feedback(UNWRITTEN, [f"Not written yet: line {unexpected[0].line} is reached."])
    known = recognized(exercise, reference, got, expected)
    if unexpected:
        lines = exception(unexpected[0], path, returned(exercise, code, path))
    else:
        lines = other_kind(got, expected)
    if known:
        lines += diagnosis(known)
    elif not unexpected:
        lines = (lines or difference(got, expected)) + held_and_failed(exercise, module)
    return Feedback(WRONG, lines, tuple(mistake.name for mistake in known))


_outcomes: dict = {}


def outcome_of(exercise: Exercise, source: str, *mistakes: Mistake) -> Outcome | None:
    """What the course's code computes with some mistakes in it; None if they exclude each other."""
    key = (exercise.number, source, *(mistake.name for mistake in mistakes))
    if key not in _outcomes:
        try:
            wrong = source
            for mistake in mistakes:
                wrong = cut.patched(wrong, exercise.functions, mistake.patches)
            outcome = probe.run(exercise.probes, probe.load(wrong))
            if (
                outcome.raised and mistakes and exercise.functions
            ):  # again, to see it from the learner's functions
                code = cut.merged(source, ast.parse(wrong), exercise.functions)
                outcome = probe.run(exercise.probes, probe.load(code))
            _outcomes[key] = outcome
        except (cut.UserError, SyntaxError):
            if len(mistakes) < 2:
                raise
            _outcomes[key] = None
    return _outcomes[key]


def recognized(exercise: Exercise, reference: str, got: Outcome, expected: Outcome) -> tuple[Mistake, ...]:
    """The known mistake, or two of them, that computes the same; empty if there is none.

    If one probe raised an exception that no mistake explains, the others may still show a mistake.
    """
    for mistake in exercise.mistakes:
        if probe.distance(got, outcome_of(exercise, reference, mistake)) <= TOLERANCE:
            return (mistake,)
    if got.raised.keys() - expected.raised.keys():
        names = got.values.keys()
        if probe.distance(got, expected, names) <= TOLERANCE:
            return ()
        for mistake in exercise.mistakes:
            if probe.distance(got, outcome_of(exercise, reference, mistake), names) <= TOLERANCE:
                return (mistake,)
        return ()
    started = time.process_time()
    explained = {
        m.name: explains(outcome_of(exercise, reference, m), got, expected) for m in exercise.mistakes
    }
    pairs = itertools.combinations(exercise.mistakes, 2)
    for pair in sorted(pairs, key=lambda pair: -sum(explained[mistake.name] for mistake in pair)):
        if time.process_time() - started > SECONDS_FOR_PAIRS:
            break
        outcome = outcome_of(exercise, reference, *pair)
        if outcome and probe.distance(got, outcome) <= TOLERANCE:
            return pair
    return ()


def explains(outcome: Outcome, got: Outcome, expected: Outcome) -> int:
    """How many of the learner's wrong values a mistake by itself gives, too."""
    same = [k for k in got.values if k in outcome.values and k in expected.values]
    same = [k for k in same if probe.deviation(got.values[k], outcome.values[k]) <= TOLERANCE]
    return sum(probe.deviation(got.values[k], expected.values[k]) > TOLERANCE for k in same)


def diagnosis(mistakes: tuple[Mistake, ...]) -> list[str]:
    lines = ["Two things at once:"] if len(mistakes) > 1 else []
    for mistake in mistakes:
        lines += [mistake.observed, f"Why: {mistake.why}", f"Look at: {mistake.look}"]
    return lines


def exception(raised: probe.Raised, path: Path, returned: str) -> list[str]:
    """The exception, where it was raised, and what the variables there were."""
    said = f"{raised.type}: {raised.message}" if raised.message else raised.type
    if raised.line is None:
        where = f"{raised.ours} then fails" if raised.ours else "the check then fails"
        return [f"{returned}; {where}: {said}" if returned else f"In the course's code, {where}: {said}"]
    inside = f", in {raised.function}" if raised.function != "<module>" else ""
    lines = [f"{shown(path)}, line {raised.line}{inside}: {said}"]
    if raised.ours:
        lines[0] += f" (raised in {raised.ours}, which that line calls)"
    if raised.values:
        lines.append("At that point: " + ", ".join(f"{k} {v}" for k, v in raised.values.items()))
    return lines


def returned(exercise: Exercise, code, path: Path) -> str:
    """The kind of what each function of an exercise returned last, for a failure after it has returned."""
    found, names = {}, {name.split(".")[-1] for name in exercise.functions} - {"__init__"}

    def note(frame, event, value):
        code, theirs = frame.f_code, frame.f_lineno < OURS
        if event == "return" and theirs and code.co_filename == str(path) and code.co_name in names:
            nothing = "nothing (None)" if value is None else ""
            found[code.co_name] = nothing or probe.shown(value) or f"a {type(value).__name__}"

    sys.setprofile(note)
    try:
        with probe.time_limit():
            probe.run(exercise.probes, probe.load(code, str(path)))
    except Exception:
        pass  # the failure is known already
    finally:
        sys.setprofile(None)
    return ", ".join(f"{name} returned {value}" for name, value in found.items())


def other_kind(got: Outcome, expected: Outcome) -> list[str]:
    """The first value that is missing, or has another shape, dtype or type than expected."""
    for name, value in expected.values.items():
        if name not in got.values:
            continue  # its probe raised an exception
        mine = got.values[name]
        if isinstance(value, torch.Tensor) and isinstance(mine, torch.Tensor):
            if mine.shape != value.shape:
                return [f"{name}: the shape is {tuple(mine.shape)}, and {tuple(value.shape)} is expected."]
            if mine.dtype != value.dtype:
                return [f"{name}: the dtype is {mine.dtype}, and {value.dtype} is expected."]
        elif isinstance(value, torch.Tensor) or isinstance(mine, torch.Tensor):
            kinds = f"a {type(mine).__name__}, and a {type(value).__name__} is expected"
            return [f"{name}: this is {kinds}."]
        elif mine != value and isinstance(value, str):
            return [f"{name}: {mine}; {value} is expected."]
    for name, raised in expected.raised.items():
        if name not in got.raised:
            return [f"An error is expected for impossible input ({raised.message}), and none is raised."]
    return []


def difference(got: Outcome, expected: Outcome) -> list[str]:
    """The first values that are wrong, and a simple relation to the right ones if there is one."""
    for name, value in expected.values.items():
        mine = got.values.get(name)
        if mine is None or probe.deviation(mine, value) <= TOLERANCE:
            continue
        if not isinstance(value, torch.Tensor):
            return [f"{name}: this is {mine}, and {value} is expected."]
        if value.dim() == 0:
            return [f"{name}: this is {mine:.6g}, and {value:.6g} is expected."]
        x, y = mine.double(), value.double()
        allowed = TOLERANCE * y[y.isfinite()].abs().max() if y.isfinite().any() else 0
        wrong = ~((x - y).abs() <= allowed) & ~(x == y)
        first = tuple(wrong.nonzero()[0].tolist())
        place = ", ".join(map(str, first))
        lines = [
            f"{name}: {wrong.sum()} of {wrong.numel()} numbers differ. The first is at [{place}]:"
            f" it is {x[first]:.6g}, and {y[first]:.6g} is expected."
        ]
        kinds = name.partition("[")[2].removesuffix("]").split(", ")
        return lines + relation(x, y, kinds)
    return ["The numbers differ."]


def relation(x: torch.Tensor, y: torch.Tensor, kinds: list[str]) -> list[str]:
    """How wrong numbers relate to the right ones, where that is simple. kinds: the dimensions' names."""
    scale = y.abs().max() * 1e-4
    if not x.isfinite().all():
        kind = "NaN" if x.isnan().any() else "infinite"
        return [f"Some of the numbers are {kind}."]
    factor = (x * y).sum() / (y * y).sum()
    if (x - factor * y).abs().max() < scale * max(1, abs(factor)):
        return [f"All of them are {factor:.4g} times what is expected."]
    offset = (x - y).mean()
    if (x - y - offset).abs().max() < scale:
        return [f"All of them are off by the same {offset:.4g}."]
    if (x.flatten().sort().values - y.flatten().sort().values).abs().max() < scale:
        return ["They are the expected numbers in another order."]
    for dim in range(1, x.dim()):
        rest = [d for d in range(x.dim()) if d != dim]
        right = ((x - y).abs() <= scale).all(dim=rest) if rest else None
        if right is not None and right.any():
            indices = ", ".join(map(str, right.nonzero().flatten().tolist()[:12]))
            kind = kinds[dim] if len(kinds) == x.dim() else f"dimension {dim}, index"
            return [f"Only at {kind} {indices} is everything right."]
    return []


def held_and_failed(exercise: Exercise, module) -> list[str]:
    """The exercise's properties that hold for the learner's code, and those that fail."""
    held, failed = [], []
    for text, holds in exercise.properties.items():
        torch.manual_seed(0)
        try:
            with probe.time_limit(), torch.no_grad():
                (held if holds(module) else failed).append(text)
        except Exception:
            failed.append(text)
    lines = []
    if held:
        lines.append(f"This holds: {'; '.join(held)}.")
    if failed:
        lines.append(f"This does not: {'; '.join(failed)}.")
    return lines
