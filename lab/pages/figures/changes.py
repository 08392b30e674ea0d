"""Which parts of a stage's source differ from the previous stage's, found by ast.

A part is named by where it is:

    RMSNorm                    a class or a function
    MLP.forward                a method
    Attention.__init__/q_proj  the statements of a function that mention a name, or what a dict has under it

Comments, docstrings and line breaks do not count.
"""

import ast
import functools

from lab import stages


@functools.cache
def parsed(name: str) -> ast.Module:
    """A stage's source."""
    return ast.parse(stages.path(name).read_text(encoding="utf-8"))


def find(tree: ast.Module, part: str) -> list[ast.AST]:
    """The nodes of a part, in order; empty if the source has none."""
    where, _, mentioned = part.partition("/")
    scope: list[ast.stmt] = tree.body
    nodes: list[ast.AST] = []
    for name in where.split("."):
        nodes = [node for node in scope if getattr(node, "name", None) == name]
        scope = nodes[0].body if nodes else []
    if not mentioned:
        return nodes
    inner = [node for outer in nodes for node in ast.walk(outer)]
    values = []
    for node in inner:
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            values += [value for key, value in pairs if getattr(key, "value", None) == mentioned]
    if values:
        return values
    statements = [node for node in inner if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    return sorted((node for node in statements if mentioned in names(node)), key=lambda node: node.lineno)


def names(node: ast.AST) -> set[str | None]:
    """The variables and attributes that a statement mentions."""
    return {getattr(inner, "id", None) or getattr(inner, "attr", None) for inner in ast.walk(node)}


def code(nodes: list[ast.AST]) -> str:
    """What Python reads in these statements, without docstrings."""
    return "\n".join(ast.unparse(without_docstrings(ast.parse(ast.unparse(node)))) for node in nodes)


def without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def changed(before: ast.Module, after: ast.Module, part: str) -> bool:
    """Whether a part is new, different or gone."""
    return code(find(before, part)) != code(find(after, part))


def units(tree: ast.Module) -> list[str]:
    """All functions and methods of a source, as parts; a class without methods as a whole."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            methods = [inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)]
            found += [f"{node.name}.{method}" for method in methods] or [node.name]
        elif isinstance(node, ast.FunctionDef):
            found.append(node.name)
    return found
