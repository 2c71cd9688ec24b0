"""Import rules that import-linter cannot see: what loads at run time, and parts of one external package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("prism_megatron", "model_providers", "tools", "examples", "benchmarks", "tests")
TOOLS = sorted([*(REPOSITORY / "tools").glob("*.py"), *(REPOSITORY / "examples").rglob("*.py")])
COMMANDS = sorted((REPOSITORY / "prism_megatron" / "commands").glob("[a-z]*.py"))
HEAVY = {"torch", "megatron", "transformers"}


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=120
    ).stdout


def imported_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    "module",
    [
        "prism_megatron",
        "prism_megatron.__main__",
        "prism_megatron.config",
        "prism_megatron.config.cli",
        "prism_megatron.config.validate",
        "prism_megatron.conversion.checkpoints.model_names",
        "prism_megatron.engine.launch",
        *(f"prism_megatron.commands.{path.stem}" for path in COMMANDS),
    ],
)
def test_module_loads_nothing_heavy(module: str) -> None:
    """Claim: parsing, checking and launching load no torch, and neither does a command that ranks import again.

    Blind spot: imports inside functions.
    """
    assert python(f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))").strip() == "[]"


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: str(tool.relative_to(REPOSITORY)))
def test_importing_a_tool_loads_nothing_heavy(tool: Path) -> None:
    """Claim: a process that re-imports a tool's or an example's main file (spawn, fork server) pays for no torch."""
    code = f"import runpy, sys; runpy.run_path({str(tool)!r}); print(sorted({HEAVY!r} & set(sys.modules)))"
    assert python(code).strip() == "[]"


def test_the_converter_loads_no_megatron() -> None:
    """Claim: whoever converts needs no Megatron: neither ``conversion`` nor the mappings of the models load it.

    Blind spot: imports inside functions.
    """
    modules = [
        *(f"prism_megatron.conversion.{path.stem}" for path in (REPOSITORY / "prism_megatron/conversion").glob("*.py")),
        "model_providers.qwen3_vl.mapping",
        *(
            f"model_providers.moe_discriminator.{name}"
            for name in ("mapping", "towers", "variant", "folder", "upcycle")
        ),
        "prism_megatron.jobs.convert",
    ]
    code = f"import importlib, sys; [importlib.import_module(name) for name in {modules!r}]"
    assert python(f"{code}; print('torch' in sys.modules, 'megatron' in sys.modules)").split() == ["True", "False"]


def test_nothing_imports_megatron_training() -> None:
    """Claim: no file of ours names megatron.training in an import. Blind spot: importlib with a built string."""
    files = [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]
    assert len(files) > 20
    offenders = [
        f"{path.relative_to(REPOSITORY)}: {name}"
        for path in files
        for name in imported_names(ast.parse(path.read_text(encoding="utf-8")))
        if name == "megatron.training" or name.startswith("megatron.training.")
    ]
    assert offenders == []
