"""Questions whose answers are numbers: the learner predicts, then the course computes."""

import ast
import operator

from exercises import progress
from exercises.units import Chapter, Question
from exercises.words import say
from lab.errors import UserError

UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "k": 10**3, "m": 10**6}
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def ask(chapter: Chapter) -> None:
    """Asks all questions of a chapter. An empty line skips one; the end of the input ends it."""
    if not chapter.questions:
        raise UserError(f"chapter {chapter.number} ({chapter.title}) has no predictions")
    right = 0
    print(
        "Predict, then compare. A number may be a product such as 2 * 12 * 64. Enter alone shows the answer."
    )
    for i, question in enumerate(chapter.questions, 1):
        print()
        say(f"{i} of {len(chapter.questions)}: {question.text}")
        if question.choices:
            print(f"({' / '.join(question.choices)})")
        try:
            given = asked(question)
        except EOFError:
            print()
            return
        answer = question.answer()
        good = given is not None and fits(given, answer, question)
        right += good
        said = question.because if "{answer}" in question.because else f"It is {{answer}}. {question.because}"
        verdict = "Right. " if good else "Not quite. " if given is not None else ""
        say(verdict + said.replace("{answer}", as_text(answer)))
    print(f"\n{right} of {len(chapter.questions)} right")
    progress.note(f"predict {chapter.number}", right=right, of=len(chapter.questions))


def as_text(answer: float | str) -> str:
    if isinstance(answer, str):
        return answer
    return f"{answer:,.0f}" if isinstance(answer, int) or abs(answer) >= 1000 else f"{answer:.4g}"


def asked(question: Question) -> float | str | None:
    """What was typed, as a number or a choice; asked again until it is one. None for an empty line."""
    while True:
        text = input("> ").strip()
        if not text:
            return None
        if question.choices:
            fitting = [choice for choice in question.choices if choice.lower().startswith(text.lower())]
            if len(fitting) == 1:
                return fitting[0]
            print(f"one of: {' / '.join(question.choices)}")
        else:
            try:
                return number(text)
            except ValueError:
                print("a number or a product, please, such as 1,024 or 2 * 12 * 64 or 36 MiB")


def number(text: str) -> float:
    """The value of an expression such as 2 * 12 * 64 or 36 MiB. Raises ValueError for other text."""
    text = text.lower().removesuffix("bytes").strip()
    for old, new in ((",", ""), ("_", ""), ("×", "*"), ("·", "*"), ("^", "**")):
        text = text.replace(old, new)
    for unit, factor in UNITS.items():
        if text.endswith(unit):
            return number(text.removesuffix(unit)) * factor
    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ArithmeticError, MemoryError):
        raise ValueError(text) from None


def value(node: ast.expr) -> float:
    """Raises ValueError for anything but numbers, + - * / ** and parentheses."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = value(node.left), value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > 100:
            raise ValueError("too large")
        return OPERATORS[type(node.op)](left, right)
    raise ValueError("not a number")


def fits(given: float | str, answer: float | str, question: Question) -> bool:
    if isinstance(answer, str):
        return given == answer
    return abs(given - answer) <= question.tolerance * abs(answer) + 1e-9
