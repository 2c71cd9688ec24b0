"""Claim: every wrong edit of ``tests/defects`` still applies to today's code and names tests that exist, so that ``make
defects`` can run: moved code keeps its guards.

Blind spot: whether those tests notice is what ``make defects`` shows.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from tests.defects.catalogue import CatalogueError, Defect, load

ROOT = Path(__file__).resolve().parents[2]
DEFECTS = load()


@functools.cache
def _functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_edit_applies() -> None:
    assert len(DEFECTS) >= 150
    for defect in DEFECTS:
        assert defect.edited(ROOT) != (ROOT / defect.file).read_text(encoding="utf-8")


def test_every_named_test_exists() -> None:
    for defect in DEFECTS:
        for test in defect.tests:
            file, _, inner = test.partition("::")
            assert (ROOT / file).exists(), f"{defect.name}: {file}"
            if inner:
                assert inner.partition("[")[0] in _functions(ROOT / file), f"{defect.name}: {test}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("absent", "x", "stands 0 times"),
        ("a = 1", "a = (", "is no Python"),
        ("a = 1  # one", "a = 1  # 1", "changes no code"),
        ("=", "==", "stands 2 times"),
    ],
)
def test_an_edit_that_does_not_apply_is_an_error(old: str, new: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("a = 1  # one\nb = 2\n")
    with pytest.raises(CatalogueError, match=message):
        Defect("d", "code.py", old, new).edited(tmp_path)


def test_an_edit_may_be_of_a_script(tmp_path: Path) -> None:
    """Claim: a file that is no Python is edited as text."""
    (tmp_path / "run.sh").write_text("set -e\nif true; then exit 3; fi\n")
    assert Defect("d", "run.sh", "exit 3", "exit 0").edited(tmp_path) == "set -e\nif true; then exit 0; fi\n"


def test_a_moved_file_and_a_doubled_or_unguarded_entry_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"gone\.py does not exist"):
        Defect("d", "gone.py", "a", "b").edited(tmp_path)
    entry = '[[defect]]\nname = "d"\nfile = "f"\nold = "a"\nnew = "b"\nclaim = "c"\n'
    (tmp_path / "one.toml").write_text(entry)
    with pytest.raises(CatalogueError, match="name the tests that must fail"):
        load(tmp_path)
    (tmp_path / "one.toml").write_text(2 * (entry + 'tests = ["t"]\n'))
    with pytest.raises(CatalogueError, match="same name"):
        load(tmp_path)
