"""The error messages of the package, as far as they stand in its source: `…` is what depends on the case."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from .pages import ROOT

PACKAGE = ROOT / "e2vpt_peft"
PROTOCOL_ERRORS = {"AttributeError"}
"""Errors by which Python's own protocols work, seen by nobody."""


PREFIXES = {"NotAdaptable": "target_modules matches '…' (…), "}
"""What errors of the package's own put in front of what they are given."""


def error_messages() -> dict[str, str]:
    """From each message that is raised to a place where it is."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    assigned = (pair for tree in trees.values() for pair in _texts_assigned(tree.body))
    constants = {name: value for name, value in assigned if not name.startswith("__")}  # not the version
    returned = {
        function.name: line.value
        for tree in trees.values()
        for function in tree.body
        if isinstance(function, ast.FunctionDef)
        for line in function.body
        if isinstance(line, ast.Return) and isinstance(line.value, (ast.JoinedStr, ast.BinOp))
    }
    found = {}
    seen: set[ast.Raise] = set()  # of nested functions, by way of the outer one, which knows more names
    for path, tree in trees.items():
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            known = {**constants, **dict(_texts_assigned(ast.walk(function)))}
            for node in ast.walk(function):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node not in seen:
                    seen.add(node)
                    if ast.unparse(node.exc.func) not in PROTOCOL_ERRORS:
                        prefix = PREFIXES.get(ast.unparse(node.exc.func), "")
                        message = prefix + _text(node.exc.args[-1], known, returned)
                        found[re.sub(r"…+", "…", message)] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def _texts_assigned(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.expr]]:
    """Names that stand for one text throughout."""
    assignments = [n for n in nodes if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
    count = Counter(node.targets[0].id for node in assignments)  # type: ignore[attr-defined]
    for node in assignments:
        name: str = node.targets[0].id  # type: ignore[attr-defined]
        if count[name] == 1 and (isinstance(node.value, (ast.JoinedStr, ast.BinOp)) or _is_text(node.value)):
            yield name, node.value


def _text(node: ast.expr, known: dict[str, ast.expr], returned: dict[str, ast.expr]) -> str:
    if _is_text(node):
        return node.value  # type: ignore[attr-defined]
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, known, returned) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, known, returned) + _text(node.right, known, returned)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, known, returned) if isinstance(node.value, ast.Name) else "…"
    if isinstance(node, ast.Name) and node.id in known:
        rest = {name: value for name, value in known.items() if name != node.id}
        return _text(known[node.id], rest, returned)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in returned:
        return _text(returned[node.func.id], {}, {})
    return "…"


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def documented_messages(page: Path) -> set[str]:
    """The messages in the list items of a page: code spans with a colon and the mend behind them."""
    return {message.strip() for _, message in re.findall(r"^- (`+)(.+?)\1: \S", page.read_text(), re.MULTILINE)}
