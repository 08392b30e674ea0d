"""Tells whether the code that a run was trained with has changed since.

A run's config.json holds a hash of the code that defines its model: the stage's file and the files of this
repository that it imports. Comments, docstrings and formatting do not count.
"""

import ast
import functools
import hashlib
from pathlib import Path

from lab import stages
from lab.errors import UserError, shown


def code_hash(stage: str) -> str:
    """The first 16 hexadecimal digits of the sha256 of a stage's code."""
    digest, files = hashlib.sha256(), [stages.path(stage)]
    for path in files:  # the list grows during the loop
        code, imported = read(path, modified(path))
        digest.update(code.encode() + b"\n")
        files += [file for file in imported if file not in files]
    return digest.hexdigest()[:16]


def modified(path: Path) -> int:
    """When a file was last modified (nanoseconds since the epoch). Raises UserError if it cannot be read."""
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise UserError(f"cannot read {shown(path)}: {error.strerror}") from None


@functools.cache
def read(path: Path, modified: int) -> tuple[str, list[Path]]:
    """A file's syntax tree as text (see `described`), and the files of this repository that it imports.

    modified is only a cache key: each version of a file is read once. Raises UserError for a syntax error.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise UserError(f"{shown(path)}, line {error.lineno}: {error.msg}") from None
    return described(tree), imports(tree, path)


def imports(tree: ast.Module, path: Path) -> list[Path]:
    """The files of this repository that a file imports."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            parent = path.parents[node.level - 1] if node.level else stages.ROOT
            parts = list(parent.relative_to(stages.ROOT).parts)
            if node.module:  # None in `from . import name`
                parts.append(node.module)
            module = ".".join(parts)
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    places = [stages.ROOT.joinpath(*name.split(".")) for name in names if name]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return [file for file in files if file.is_file()]


def described(node: ast.AST) -> str:
    """A syntax tree as text, without docstrings and positions; it is the same in every version of Python.

    (The output of ast.dump is not: which empty fields it prints depends on the version.)
    """
    parts = []
    for name, value in ast.iter_fields(node):
        if isinstance(value, list):
            value = [child for child in value if not is_docstring(child)]
        if value is None or value == [] or name in ("type_comment", "kind", "ctx"):
            continue
        items = value if isinstance(value, list) else [value]
        shown_items = (described(item) if isinstance(item, ast.AST) else repr(item) for item in items)
        parts.append(f"{name}={','.join(shown_items)}")
    return f"{type(node).__name__}({';'.join(parts)})"


def is_docstring(node: ast.AST) -> bool:
    """Whether a statement is only a string: the docstring of a module, class, function or field."""
    return (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and type(node.value.value) is str
    )


def trained_with(config: dict) -> set[str | None]:
    """The hashes of the code that a run was trained with. None is among them if config.json has none."""
    resumed = {part["code"] for part in config.get("resumed", []) if "code" in part}
    return {config.get("code")} | resumed


def difference(config: dict) -> str | None:
    """How a run's code differs from today's, in words; None if it does not."""
    name, hashes = config["stage"], trained_with(config)
    if name not in stages.names():
        return f"its stage, {name}, does not exist here"
    if None in hashes:
        return "it was made before runs recorded their code"
    today = code_hash(name)
    if hashes == {today}:
        return None
    if today in hashes:
        return f"{shown(stages.path(name))} changed during training"
    return f"{shown(stages.path(name))} has changed since training"
