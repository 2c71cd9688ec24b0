"""What a public function raises for its callers to handle stands in its docstring."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from prism_megatron import errors

ROOT = Path(__file__).resolve().parents[2]
FAMILY = {
    name: {parent.__name__ for parent in error.__mro__ if issubclass(parent, errors.PrismError)}
    for name, error in vars(errors).items()
    if isinstance(error, type) and issubclass(error, errors.PrismError)
}
"""Every error of ours, with the names that stand for it: its own and its parents'."""


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in tree.body:
        owned = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
        yield from (one for one in owned if isinstance(one, ast.FunctionDef) and not one.name.startswith("_"))


def raised(function: ast.FunctionDef) -> set[str]:
    """Names of our own errors that the function's own body raises."""
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            names.add(node.exc.func.id)
    return names & set(FAMILY)


def undocumented(text: str) -> list[str]:
    """Public functions in a module's text that keep an error to themselves."""
    return [
        f"{function.name}: {name}"
        for function in public_functions(ast.parse(text))
        for name in sorted(raised(function))
        if not any(parent in (ast.get_docstring(function) or "") for parent in FAMILY[name])
    ]


def test_public_functions_say_what_they_raise() -> None:
    """Blind spot: what a function that is called raises."""
    found = {}
    for root in ("prism_megatron", "model_providers"):
        for path in sorted((ROOT / root).rglob("*.py")):
            if names := undocumented(path.read_text(encoding="utf-8")):
                found[str(path.relative_to(ROOT))] = names
    assert not found


def test_one_that_keeps_an_error_to_itself_is_found() -> None:
    body = 'def f():\n    """{}"""\n    raise DataError("x")\n'
    assert undocumented(body.format("Read.")) == ["f: DataError"]
    assert undocumented(body.format("Read. Raises ConfigError.")) == ["f: DataError"]
    assert undocumented(body.format("Read. Raises DataError.")) == []
    assert undocumented(body.format("Read. Raises PrismError.")) == []
    assert undocumented(body.format("Read.").replace("def f", "def _f")) == []
