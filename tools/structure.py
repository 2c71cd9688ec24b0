#!/usr/bin/env python
"""How the code is housed, in figures: sizes of folders and functions, and how parameters travel through it.

``python tools/structure.py [--root CHECKOUT] [FILE:FUNCTION:PARAMETER …]``. A walk follows one parameter from a
function inwards, wherever it is handed on whole: a *stay* is a function that receives it, a *room* a module, and a
*climb* a step of the walk, in the order of the calls, into a layer above the one before (import-linter's layers).
"""

from __future__ import annotations

import argparse
import ast
import itertools
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("prism_megatron", "model_providers")
MANY_PARAMETERS = 6
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Function:
    """A function or method, by its module and its name in it."""

    module: str
    name: str
    node: FunctionNode

    @property
    def parameters(self) -> list[str]:
        arguments = self.node.args
        return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]

    @property
    def lines(self) -> int:
        return (self.node.end_lineno or self.node.lineno) - self.node.lineno + 1


@dataclass
class House:
    """What was read of a checkout."""

    root: Path
    layers: Sequence[Sequence[str]]
    functions: dict[tuple[str, str], Function] = field(default_factory=dict)
    names: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)
    """by module: what a local name stands for, as module and name there"""
    lines: dict[str, int] = field(default_factory=dict)
    """by path"""

    @classmethod
    def read(cls, root: Path) -> House:
        text = (root / "pyproject.toml").read_text(encoding="utf-8")
        contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
        layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
        house = cls(root, [[name.strip(" ()") for name in layer.split("|")] for layer in layers])
        for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
            house._read_module(path)
        return house

    def _read_module(self, path: Path) -> None:
        text, relative = path.read_text(encoding="utf-8"), path.relative_to(self.root)
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(text)
        self.lines[str(relative)] = text.count("\n")
        self.names[module] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    self.names[module][alias.asname or alias.name] = (node.module, alias.name)
        for node in tree.body:
            if isinstance(node, FunctionNode):
                self.functions[module, node.name] = Function(module, node.name, node)
            elif isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, FunctionNode):
                        name = f"{node.name}.{inner.name}"
                        self.functions[module, name] = Function(module, name, inner)

    def layer(self, module: str) -> int:
        """Height of a module's layer: 0 is the lowest."""
        for height, layer in enumerate(reversed(self.layers)):
            if any(module == name or module.startswith(f"{name}.") for name in layer):
                return height
        return len(self.layers)

    def called(self, caller: Function, call: ast.Call) -> Function | None:
        """The function that a call reaches, where its name tells."""
        target = call.func
        names = self.names[caller.module]
        if isinstance(target, ast.Name):
            module, name = names.get(target.id, (caller.module, target.id))
            return self.functions.get((module, name)) or self.functions.get((module, f"{name}.__init__"))
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
            owner = target.value.id
            if owner in {"self", "cls"}:
                return self.functions.get((caller.module, f"{caller.name.partition('.')[0]}.{target.attr}"))
            module, name = names.get(owner, (caller.module, owner))
            return self.functions.get((f"{module}.{name}", target.attr)) or self.functions.get(
                (module, f"{name}.{target.attr}")
            )
        return None


def walk(
    house: House, function: Function, parameter: str, seen: set[tuple[str, str]] | None = None
) -> Iterator[Function]:
    """The functions that ``parameter`` reaches, in the order of the calls; each is entered once."""
    seen = set() if seen is None else seen
    if (function.module, function.name) in seen:
        return
    seen.add((function.module, function.name))
    yield function
    calls = [node for node in ast.walk(function.node) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
        callee = house.called(function, call)
        if callee is None:
            continue
        parameters = [name for name in callee.parameters if name not in {"self", "cls"}]
        handed = [name for name, value in zip(parameters, call.args, strict=False) if _is(value, parameter)]
        handed += [keyword.arg for keyword in call.keywords if keyword.arg and _is(keyword.value, parameter)]
        for name in handed:
            yield from walk(house, callee, name, seen)


def _is(value: ast.expr, name: str) -> bool:
    return isinstance(value, ast.Name) and value.id == name


def shared_lines(house: House, one: str, other: str) -> tuple[int, int, int]:
    """Lines of two places that stand in both, and how many each has: without blanks, imports and lone brackets."""

    def code(place: str) -> Counter[str]:
        lines: Counter[str] = Counter()
        for path in (path for path in house.lines if path.startswith(place)):
            for line in (house.root / path).read_text(encoding="utf-8").splitlines():
                text = line.strip()
                if len(text) > 3 and not text.startswith(("from ", "import ", "#", '"""')):
                    lines[text] += 1
        return lines

    mine, theirs = code(one), code(other)
    return (mine & theirs).total(), mine.total(), theirs.total()


def describe(house: House, walks: Sequence[str]) -> list[str]:
    """All figures, a line each."""
    folders = Counter(str(Path(path).parent) for path in house.lines)
    lines = Counter[str]()
    for path, count in house.lines.items():
        lines[str(Path(path).parent)] += count
    largest = max(folders, key=lambda name: lines[name])
    text = ["files and lines per folder"]
    text += [f"  {folders[name]:4} {lines[name]:6}  {name}" for name in sorted(folders)]
    text.append(f"largest room: {largest}, {lines[largest] / lines.total():.0%} of all lines")
    loops = {path: count for path, count in house.lines.items() if _is_loop(path)}
    text += ["loops", *(f"  {count:4} lines  {path}" for path, count in sorted(loops.items()))]
    functions = sorted(house.functions.values(), key=lambda function: -function.lines)
    text.append("longest functions")
    text += [f"  {one.lines:4} lines  {one.module}.{one.name}" for one in functions[:5]]
    crowded = [one for one in functions if len([p for p in one.parameters if p != "self"]) > MANY_PARAMETERS]
    text.append(f"functions with more than {MANY_PARAMETERS} parameters: {len(crowded)} of {len(functions)}")
    for one, other in (
        ("prism_megatron/stages/align/run.py", "prism_megatron/stages/warm_start/run.py"),
        ("prism_megatron/stages/align/", "prism_megatron/stages/warm_start/"),
    ):
        shared, first, second = shared_lines(house, one, other)
        if first and second:
            text.append(f"lines in both {one} ({first}) and {other} ({second}): {shared}")
    for start in walks:
        text.append(_walk_line(house, start))
    return text


def _is_loop(path: str) -> bool:
    name = Path(path).name
    return path.startswith("prism_megatron/stages/") and (name == "stage.py" or name.endswith("_run.py"))


def _walk_line(house: House, start: str) -> str:
    file, function, parameter = start.split(":")
    module = ".".join(Path(file).with_suffix("").parts)
    stays = list(walk(house, house.functions[module, function], parameter))
    heights = [house.layer(stay.module) for stay in stays]
    climbs = sum(later > earlier for earlier, later in itertools.pairwise(heights))
    return f"walk of {start}: {len(stays)} stays in {len({stay.module for stay in stays})} rooms, {climbs} climbs"


DEFAULT_WALKS: Mapping[str, tuple[str, ...]] = {
    "prism_megatron/stages/align/build.py": (
        "prism_megatron/stages/align/build.py:align_on:config",
        "prism_megatron/stages/align/build.py:align_on:world",
        "prism_megatron/training/policy_update.py:update_policy:plan",
        "prism_megatron/game/judge.py:train:plan",
    ),
    "prism_megatron/stages/align/run.py": (
        "prism_megatron/stages/align/run.py:align_on:config",
        "prism_megatron/stages/align/run.py:align_on:world",
        "prism_megatron/stages/align/stage.py:align:plan",
    ),
}
"""Where walks begin by default, by a file that the checkout has."""


def main() -> int:
    """Print the figures of a checkout; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("walks", nargs="*", metavar="FILE:FUNCTION:PARAMETER")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    options = parser.parse_args()
    house = House.read(options.root)
    default = next((walks for path, walks in DEFAULT_WALKS.items() if path in house.lines), ())
    print("\n".join(describe(house, options.walks or default)))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from prism_megatron.terminal import guarded

    sys.exit(guarded(main))
