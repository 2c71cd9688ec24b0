"""Claim: a stage's whole configuration is known where it is taken apart and nowhere below; its loop is one screen."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHOLE = {"AlignConfig", "RLVRConfig", "WarmStartConfig"}
MAY_KNOW = ("prism_megatron/config/", "prism_megatron/run/", "prism_megatron/commands/", "tools/")
STAGES = sorted((ROOT / "prism_megatron" / "stages").glob("*/stage.py"))


def _knows(path: Path) -> set[str]:
    """Which whole configurations a file imports."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in nodes for alias in node.names} & WHOLE


def test_whole_configurations_are_taken_apart_at_the_door() -> None:
    knowing = []
    for package in ("prism_megatron", "model_providers"):
        for path in (ROOT / package).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            if _knows(path) and not name.startswith(MAY_KNOW) and path.name != "build.py":
                knowing.append(name)
    assert not knowing
    assert _knows(ROOT / "prism_megatron/stages/align/build.py") == {"AlignConfig"}, "blind: the search finds nothing"


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.parent.name)
def test_a_loop_fits_on_a_screen(path: Path) -> None:
    assert path.read_text().count("\n") <= 100
