"""A model with one hidden mistake: its loss curve, its tests, and whether an answer names the right place."""

import ast
import difflib
import functools
import random
from types import ModuleType

import torch

from exercises import cut, diagnose, probe, progress, properties
from exercises.units import Chapter, Exercise, Mistake
from exercises.words import say
from lab import atomic, cli, stages
from lab.errors import UserError, shown
from lab.training import cost

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings "
STEPS, EVERY, LENGTH = 48, 12, 24
VISIBLE = 0.01
"""The smallest difference of the last loss that counts as a clue."""


def hunt(chapter: Chapter, seed: int | None, answer: str | None, give_up: bool) -> None:
    """Shows the hunt that is open, or begins one; or judges an answer."""
    if not is_model(chapter):
        raise UserError(f"{chapter.title} has no model to hunt in: try {model_chapters()}")
    known, path = progress.of(key(chapter)), stages.MY / f"hunt{chapter.number}.py"
    hidden = [pair for pair in candidates(chapter) if [pair[0].number, pair[1].name] == known.get("hidden")]
    going_on = bool(hidden) and not known.get("found") and path.exists()
    if answer is not None or give_up:
        if not going_on:
            raise UserError(f"no hunt is open: {cli.program()} hunt {chapter.number}")
        judge(chapter, *hidden[0], answer, known)
        return
    if not going_on or seed not in (None, known["seed"]):
        seed = random.randrange(1000) if seed is None else seed
        exercise, mistake = choose(chapter, seed)
        hidden = [(exercise, mistake)]
        progress.keep(path)
        atomic.write(path, with_mistake(chapter, exercise, mistake).encode())
        names = [exercise.number, mistake.name]
        progress.note(key(chapter), seed=seed, hidden=names, found=False, tries=0)
    seed = progress.of(key(chapter))["seed"]
    print(f"{shown(path)} is {chapter.source} with one mistake (seed {seed}).\n")
    show_clues(chapter, loaded(with_mistake(chapter, *hidden[0])))
    print(
        f"\nRead the file, change it, train it: python train.py --stage {shown(path)}\n"
        f"When you know where it is, name the function or the line:\n"
        f"{cli.program()} hunt {chapter.number} --answer FUNCTION"
    )


def key(chapter: Chapter) -> str:
    """Where progress.json stores a chapter's hunt."""
    return f"hunt {chapter.number}"


def is_model(chapter: Chapter) -> bool:
    return "\nclass GPT(" in (stages.ROOT / chapter.source).read_text(encoding="utf-8")


def model_chapters() -> str:
    from exercises.chapters import CHAPTERS

    return ", ".join(chapter.number for chapter in CHAPTERS if is_model(chapter))


def candidates(chapter: Chapter) -> list[tuple[Exercise, Mistake]]:
    """All mistakes in the chapter's model, but not those in functions beyond the stage."""
    tree = ast.parse((stages.ROOT / chapter.source).read_text(encoding="utf-8"))
    parts = [*chapter.exercises_of(chapter.source), *([chapter.whole] if chapter.whole else [])]
    parts = [exercise for exercise in parts if all(cut.find(tree, name) for name in exercise.functions)]
    return [(exercise, mistake) for exercise in parts for mistake in exercise.mistakes]


def with_mistake(chapter: Chapter, exercise: Exercise, mistake: Mistake) -> str:
    """The text of the stage's file with a mistake in it."""
    source = (stages.ROOT / chapter.source).read_text(encoding="utf-8")
    return cut.patched(source, exercise.functions, mistake.patches)


def choose(chapter: Chapter, seed: int) -> tuple[Exercise, Mistake]:
    """A mistake by seed: one that can be trained, and that the loss or a fact gives away."""
    stage, mistakes = stages.load(stages.find(chapter.source)), candidates(chapter)
    expected, right = losses(stage)[-1], facts(chapter, stage)
    random.Random(seed).shuffle(mistakes)
    for exercise, mistake in mistakes:
        try:
            module = loaded(with_mistake(chapter, exercise, mistake))
            shows = abs(losses(module)[-1] - expected) > VISIBLE
        except Exception:
            continue  # a mistake that raises an exception needs no hunt
        if shows or facts(chapter, module) != right:
            return exercise, mistake
    raise UserError(f"no mistake of {chapter.title} can be hunted")


@functools.cache
def loaded(text: str) -> ModuleType:
    return probe.load(text)


@functools.cache
def losses(module: ModuleType) -> list[float]:
    """The training loss of a tiny model at each step, on one sentence."""
    letters = sorted(set(TEXT))
    text = torch.tensor([letters.index(letter) for letter in TEXT * 3])
    model = tiny(module, len(letters)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    draw, found = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        starts = torch.randint(len(text) - LENGTH - 1, (8,), generator=draw).tolist()
        batch = torch.stack([text[i : i + LENGTH + 1] for i in starts])
        _, parts = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        if hasattr(model, "after_step"):
            model.after_step()
        found.append(parts["next_token"].item())
    return found


def tiny(module: ModuleType, vocab_size: int):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32}
    return module.GPT(module.GPTConfig(vocab_size=vocab_size, block_size=LENGTH, **sizes))


def facts(chapter: Chapter, module: ModuleType) -> dict[str, str]:
    """What can be measured without training: sizes, and which of the chapter's properties hold."""
    model = tiny(module, 29)
    found = {"parameters": f"{cost.parameters(model):,}"}
    try:
        found["bytes of the cache"] = f"{model.new_cache(1, LENGTH).nbytes:,}"
    except Exception as error:
        found["bytes of the cache"] = f"FAILS: {error}"
    tests = {"no position sees a later one": properties.no_leak}
    tests["with a cache the logits are the same"] = properties.cache_equals_no_cache
    for exercise in chapter.exercises_of(chapter.source):
        tests |= exercise.properties
    for text, holds in tests.items():
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                found[text] = "holds" if holds(module) else "FAILS"
        except Exception as error:
            if not isinstance(error, AttributeError):  # of a function that is beyond the stage
                found[text] = f"FAILS: {str(error).splitlines()[0]}"
    return found


def show_clues(chapter: Chapter, module: ModuleType) -> None:
    """The loss while training, and what can be measured, beside the stage's own."""
    stage = stages.load(stages.find(chapter.source))
    right, wrong = losses(stage), losses(module)
    steps = [0, *range(EVERY - 1, STEPS, EVERY)]
    print("training loss at step " + "".join(f"{step + 1:>8}" for step in steps))
    print("    the stage         " + "".join(f"{right[step]:8.3f}" for step in steps))
    print("    with the mistake  " + "".join(f"{wrong[step]:8.3f}" for step in steps))
    print()
    expected = facts(chapter, stage)
    for text, found in facts(chapter, module).items():
        other = f"   (the stage: {expected[text]})" if found != expected[text] else ""
        print(f"    {text}: {found}{other}")


def judge(chapter: Chapter, exercise: Exercise, mistake: Mistake, answer: str | None, known: dict) -> None:
    """Says whether the answer, a function or a line, is where the mistake is. None gives up."""
    source = with_mistake(chapter, exercise, mistake)
    lines = changed_lines((stages.ROOT / chapter.source).read_text(encoding="utf-8"), source)
    tree = ast.parse(source)
    places = {function_at(tree, line) for line in lines} - {""}
    if answer is None:
        print(f"It is in {' and '.join(sorted(places))}, line {lines[0]}.")
    elif right(answer.strip(), lines, places, tree):
        print(f"Yes: {' and '.join(sorted(places))}, line {lines[0]}. Tries: {known['tries'] + 1}.")
    else:
        progress.note(key(chapter), tries=known["tries"] + 1)
        print(f"No, {answer} is as in the course. Which numbers could tell the right place from a wrong one?")
        return
    for line in diagnose.diagnosis((mistake,)):
        say(line)
    progress.note(key(chapter), found=True, tries=known["tries"] + 1, count=known.get("count", 0) + 1)


def right(answer: str, lines: list[int], places: set[str], tree: ast.Module) -> bool:
    """Raises UserError if the answer names neither a line nor a function of the file."""
    if answer.isdecimal():
        return int(answer) in lines
    names = [name for name in functions(tree) if answer in (name, name.split(".")[-1])]
    if not names:
        raise UserError(
            f"there is no function {answer!r} in the file; give one such as Attention.forward, or a line"
        )
    if len(names) > 1:
        raise UserError(f"{answer} could be {', '.join(names)}: give the class, too")
    return names[0] in places


def changed_lines(before: str, after: str) -> list[int]:
    """The lines of `after` that differ, from 1; where lines were removed, the one that follows."""
    matcher = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False)
    blocks = [(b, b_end) for kind, _, _, b, b_end in matcher.get_opcodes() if kind != "equal"]
    return [line for b, b_end in blocks for line in range(b + 1, max(b_end, b + 1) + 1)]


def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """The functions of a file by their dotted names."""
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for outer in tree.body:
        if isinstance(outer, ast.ClassDef):
            found |= {f"{outer.name}.{n.name}": n for n in outer.body if isinstance(n, ast.FunctionDef)}
    return found


def function_at(tree: ast.Module, line: int) -> str:
    """The name of the function that a line is in; empty outside of all."""
    inside = [name for name, node in functions(tree).items() if node.lineno <= line <= node.end_lineno]
    return inside[0] if inside else ""
