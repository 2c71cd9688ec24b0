"""The command that goes on is one that can be typed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from prism_megatron.run.advice import how_to_go_on


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@pytest.mark.parametrize(
    ("argv", "tool"),
    [
        (["tools/run_align.py", "--tp", "2"], "python tools/run_align.py"),
        (["/usr/bin/prism-align"], "/usr/bin/prism-align"),
        (["/x/prism_megatron/__main__.py", "align", "--tp", "2"], "python -m prism_megatron align"),
        (["/x/other/__main__.py"], "python /x/other/__main__.py"),
    ],
)
def test_each_way_to_start_a_tool(argv: list[str], tool: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert how_to_go_on(tmp_path) == f"go on with `{tool} --output {tmp_path} --resume auto`"
    (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_000002" / "state.json").touch()
    assert how_to_go_on(tmp_path) == f"go on with `{tool} --load {tmp_path}`"


def test_names_with_spaces_are_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["my tools/run_align.py"])
    assert how_to_go_on(Path("a run")) == "go on with `python 'my tools/run_align.py' --output 'a run' --resume auto`"


@pytest.mark.parametrize(
    ("local", "everywhere", "words"),
    [("8", "8", "`torchrun --nproc-per-node 8 t.py --output r"), ("4", "8", "` by the same torchrun on every host")],
)
def test_torchrun(local: str, everywhere: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["t.py"])
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": local, "WORLD_SIZE": everywhere}.items():
        monkeypatch.setenv(name, value)
    assert words in how_to_go_on(Path("r"))
