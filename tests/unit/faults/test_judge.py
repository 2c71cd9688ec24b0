"""What holds of a run after a fault: each check finds what was planted, and nothing in what is right."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.faults import judge
from tests.faults.faults import damage
from tests.unit.conversion.folders import checkpoint_of, weights

Row = dict[str, Any]


def rows(count: int = 3) -> list[Row]:
    return [{"step": n, "policy_version": n + 1, "sampled_version": n, "rollouts": 4, "loss": 0.5 * n}
            for n in range(count)]  # fmt: skip


def test_equal_rows_are_equal_to_the_bit() -> None:
    """Claim: the next number of float64, None instead of a figure, a missing name and a missing row all differ."""
    assert judge.differing_rows(rows(), rows()) == []
    for change in ({"loss": math.nextafter(0.5, 1)}, {"loss": None}):
        (line,) = judge.differing_rows([rows()[0], rows()[1] | change, rows()[2]], rows())
        assert line.startswith("row 1: loss is ")
    assert judge.differing_rows(rows(2), rows()) == ["2 rows instead of 3"]
    without = [{name: value for name, value in row.items() if name != "loss"} for row in rows(1)]
    assert judge.differing_rows(without, rows(1)) == ["row 0: loss is None, not 0.0"]
    assert len(judge.differing_rows(without, [row | {"loss": None} for row in rows(1)])) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 0}, "steps are [0, 0, 2]"),
        ({"loss": math.nan}, "loss is nan"),
        ({"sampled_version": 0}, "sampled by 0, now 2"),
        ({"policy_version": 0}, "sampled by 1, now 0"),
        ({"rollouts": 3}, "3 rollouts instead of 4"),
        ({"new": 1}, "['new'] stand in one"),
    ],
)
def test_a_run_with_servers_is_a_whole(change: Row, words: str) -> None:
    """Claim: figures may be others, but not not-a-number; steps, versions, counts and names may not."""
    assert judge.inconsistent_rows([row | {"loss": 9.0} for row in rows()], rows()) == []
    found = judge.inconsistent_rows([rows()[0], rows()[1] | change, rows()[2]], rows())
    assert any(words in line for line in found), found


def test_files_are_compared_by_name_and_bytes() -> None:
    assert judge.differing_results({"a": "1"}, {"a": "1"}) == []
    assert [line.split()[0] for line in judge.differing_results({"a": "1", "b": "1"}, {"a": "2", "c": "1"})] == [
        "a", "b", "c",
    ]  # fmt: skip


def test_torn_folders_are_found(tmp_path: Path) -> None:
    """Claim: a checkpoint that lacks bytes, an export that does, a name that nobody knows and half a JSON file."""
    root, export = tmp_path / "checkpoints", tmp_path / "hf"
    root.mkdir()
    export.mkdir()
    for step in (1, 2):
        checkpoint_of(root / f"step_{step:06d}", weights(), {})
    (root / ".step_000003.saving").mkdir()
    (export / "config.json").write_text("{}")
    save_file({"a": torch.zeros(8)}, export / "model.safetensors")
    (tmp_path / "summary.json").write_text(json.dumps({"ended": "done"}))
    assert judge.torn(tmp_path) == []
    assert judge.leftovers(tmp_path) == [f"{root}/.step_000003.saving was left"]
    for name in (".hf.0a1b2c3d", ".summary.json.7.part", ".lock"):
        (tmp_path / name).touch()
    assert len(judge.leftovers(tmp_path)) == 3
    (root / "step_000003.tmp").mkdir()
    os.truncate(export / "model.safetensors", (export / "model.safetensors").stat().st_size - 1)
    (tmp_path / "summary.json").write_text('{"ended"')
    said = damage(tmp_path, choice=0.5, share=0.5)
    found = judge.torn(tmp_path)
    assert said is not None and said.startswith("checkpoints/step_000002/")
    for words in ("step_000002", "step_000003.tmp has a name", "model.safetensors is cut short", "summary.json is no"):
        assert any(words in line for line in found), (words, found)
    assert len(found) == 4


def test_the_only_checkpoint_is_not_damaged(tmp_path: Path) -> None:
    checkpoint_of(tmp_path, weights(), {}).rename(tmp_path.with_name("one"))
    (tmp_path / "checkpoints").mkdir(parents=True)
    tmp_path.with_name("one").rename(tmp_path / "checkpoints" / "step_000001")
    assert damage(tmp_path, choice=0.0, share=0.0) is None


LOST = "rank 1 was ended by SIGKILL; go on with `x`"
FULL = "error: /a: no space left on device; make room, then go on with `x`"


@pytest.mark.parametrize(
    ("fault", "victim", "status", "errors", "number"),
    [
        ("kill", "rank", 1, LOST, 0),
        ("kill", "rank", 1, f"Traceback (most recent call last)\n{LOST}", 1),
        ("kill", "rank", 1, "", 1),
        ("kill", "everything", -9, "Traceback", 0),
        ("kill", "rank", 0, "", 0),
        ("disk", "", 2, FULL, 0),
        ("disk", "", 2, "error: no version is in use: [Errno 28] No space left on device; make room", 0),
        ("disk", "", 1, FULL, 1),
        ("disk", "", 2, "error: something else", 1),
    ],
)
def test_how_a_failure_is_told(fault: Any, victim: str, status: int, errors: str, number: int) -> None:
    """Claim: one line that says why, no traceback, and for a full disk its own line and status."""
    assert len(judge.ill_said(fault, victim, status, errors, torchrun=False)) == number
    assert judge.ill_said(fault, victim, status, "Traceback", torchrun=True) == []
