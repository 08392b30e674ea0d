"""Cuts blanks into the course's files, and puts a learner's functions into them. The files carry no marks.

The functions are found in the syntax tree by name, so a blank is always cut from the code as it is today.
"""

import ast

from lab.errors import UserError

OURS = 1_000_000
"""Added to the line numbers of the course's code where it is mixed with the learner's."""
FUTURE = "from __future__ import annotations"


def find(tree: ast.Module, name: str) -> ast.FunctionDef | ast.ClassDef | None:
    """The function or class with a dotted name such as KVCache.update; the last one if there are several."""
    scope = tree
    for part in name.split("."):
        defined = [n for n in scope.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part]
        if not defined:
            return None
        scope = defined[-1]
    return scope


def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """The functions of a file by their dotted names."""
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for outer in tree.body:
        if isinstance(outer, ast.ClassDef):
            found |= {f"{outer.name}.{n.name}": n for n in outer.body if isinstance(n, ast.FunctionDef)}
    return found


def body_lines(tree: ast.Module, source: str, name: str) -> tuple[int, int]:
    """The lines of a function after its docstring: the index of the first, and of the one after the last."""
    node = find(tree, name)
    first = node.body[0]
    if ast.get_docstring(node) is not None:
        return first.end_lineno, node.end_lineno
    lines, start = source.splitlines(), first.lineno - 1
    while lines[start - 1].lstrip().startswith("#"):  # a comment would tell what comes
        start -= 1
    return start, node.end_lineno


def blank(source: str, numbers: dict[str, str]) -> str:
    """The source with bodies replaced. numbers: functions and the numbers of their exercises."""
    tree, lines = ast.parse(source), source.splitlines(keepends=True)
    places = {name: body_lines(tree, source, name) for name in numbers}
    for name, (start, end) in sorted(places.items(), key=lambda item: item[1], reverse=True):
        indent = " " * find(tree, name).body[0].col_offset
        lines[start:end] = [f'{indent}raise NotImplementedError("exercise {numbers[name]}: {name}")\n']
    return "".join(lines)


def piece(source: str, name: str) -> str:
    """The text of a function, with its decorators."""
    node = find(ast.parse(source), name)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def is_blank(node: ast.FunctionDef) -> bool:
    """Whether nothing but a docstring and `raise NotImplementedError` is there."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return len(body) == 1 and isinstance(body[0], ast.Raise) and "NotImplementedError" in ast.unparse(body[0])


def merged(reference: str, mine: ast.Module, names: list[str]) -> ast.Module:
    """The course's code with the named functions from the learner's tree.

    The imports and whatever else the learner has defined under new names come along, since the functions may
    use them. The learner's lines keep their numbers; the course's are higher by OURS.
    """
    tree = ast.parse(reference)
    ast.increment_lineno(tree, OURS)
    for name in names:
        replace(tree, name, find(mine, name))
    for node in mine.body:
        ours = find(tree, node.name) if isinstance(node, ast.ClassDef) else None
        if ours:
            known = {child.name for child in ours.body if isinstance(child, ast.FunctionDef)}
            ours.body += [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name not in known]
    imported = {ast.unparse(node) for node in tree.body if imports(node)}
    known = {name for node in tree.body for name in defined(node)}
    new = [node for node in mine.body if imports(node) and ast.unparse(node) not in imported | {FUTURE}]
    new += [node for node in mine.body if defined(node) and not defined(node) & known]
    early = [node for node in new if not used_at_once(node) & known]
    first = next(i for i, node in enumerate(tree.body) if defined(node))  # after the course's imports
    tree.body[first:first] = early
    tree.body += [node for node in new if node not in early]
    return tree


def replace(tree: ast.Module, name: str, node: ast.FunctionDef) -> None:
    """Puts a function in the place of the one with its name."""
    *outer, _ = name.split(".")
    scope = find(tree, ".".join(outer)) if outer else tree
    scope.body[scope.body.index(find(tree, name))] = node


def defined(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a file defines, other than by an import."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def imports(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def used_at_once(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a file needs when it is executed, not when it is called."""
    parts = [node]
    if isinstance(node, ast.FunctionDef):
        parts = [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
    elif isinstance(node, ast.ClassDef):
        parts = [*node.decorator_list, *node.bases]
    return {child.id for part in parts for child in ast.walk(part) if isinstance(child, ast.Name)}


def patched(source: str, functions: tuple[str, ...], patches: tuple[tuple[str, str], ...]) -> str:
    """The source with each patch applied to the text of the functions, where it must fit exactly once.

    Without functions, it must fit exactly once in the whole source. Raises UserError if it does not.
    """
    for old, new in patches:
        starts = [(0, len(source))]
        if functions:
            tree, offsets = ast.parse(source), line_offsets(source)
            nodes = [find(tree, name) for name in functions]
            starts = [(offsets[node.lineno - 1], offsets[node.end_lineno]) for node in nodes if node]
        places = {start + i for start, end in starts for i in occurrences(source[start:end], old)}
        if len(places) != 1:
            raise UserError(f"{old!r} occurs {len(places)} times in {', '.join(functions) or 'the source'}")
        (place,) = places
        source = source[:place] + new + source[place + len(old) :]
    return source


def line_offsets(source: str) -> list[int]:
    """Where each line starts; the last entry is the length of the source."""
    offsets = [0]
    for line in source.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    return offsets


def occurrences(text: str, part: str) -> list[int]:
    return [i for i in range(len(text)) if text.startswith(part, i)]


def arguments(node: ast.FunctionDef) -> list[str]:
    """The names of a function's parameters that have no default."""
    plain = [*node.args.posonlyargs, *node.args.args]
    return [arg.arg for arg in plain[: len(plain) - len(node.args.defaults)]]
