"""The error messages of the package, as far as they stand in its source."""

from __future__ import annotations

import ast
from pathlib import Path

from .pages import ROOT

NO_MESSAGE = {"AttributeError", "StopIteration", "NotImplementedError"}
"""Errors by which Python's own protocols work."""


def error_messages() -> dict[str, str]:
    """From the place of each `raise` in the package to the longest piece of its message that is always the same."""
    found = {}
    for path in sorted((ROOT / "e2vpt_peft").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                if ast.unparse(node.exc.func) not in NO_MESSAGE:
                    place = f"{path.relative_to(ROOT)}:{node.lineno}"
                    found[place] = max(_pieces(node.exc, tree, path), key=len, default="")
    return found


def _pieces(expression: ast.AST, tree: ast.Module, path: Path) -> list[str]:
    """The literal pieces of an expression; of a constant or a function of the module, those of its definition."""
    pieces = [" ".join(n.value.split()) for n in ast.walk(expression) if _is_text(n)]
    if pieces and max(map(len, pieces)) >= 8:
        return pieces
    names = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and names & {alias.name for alias in node.names}:
            other = path.parent / f"{node.module.replace('.', '/')}.py"
            if other.exists():
                pieces += _definitions(ast.parse(other.read_text()), names)
    return pieces + _definitions(tree, names)


def _definitions(tree: ast.Module, names: set[str]) -> list[str]:
    pieces: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id in names for t in node.targets):
            pieces += [" ".join(n.value.split()) for n in ast.walk(node.value) if _is_text(n)]
        if isinstance(node, ast.FunctionDef) and node.name in names:
            without_docstring = node.body[1:] if ast.get_docstring(node) else node.body
            pieces += [" ".join(n.value.split()) for line in without_docstring for n in ast.walk(line) if _is_text(n)]
    return pieces


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
