"""A run that writes its checkpoints beside its steps is the run that waits for them (``--save-async``).

Blind spot: kills, which ``tests/distributed/test_async_save.py`` has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.observability.metrics import read_metrics
from tests.integration.test_align_records import write_records
from tests.integration.test_resume import KINDS, SIZES, STEPS, assert_same

BESIDE = "to be written beside the next steps"


def state_of(folder: Path) -> dict[str, Any]:
    """``state.json`` without what tells the two runs apart."""
    document: dict[str, Any] = json.loads((folder / "state.json").read_text())
    del document["state"]["run"], document["state"]["config"]
    return document


@pytest.mark.long
@pytest.mark.parametrize("stage", KINDS)
def test_checkpoints_written_beside_the_steps_are_the_same(tmp_path: Path, stage: str) -> None:
    """Claim: rows, the last checkpoint's tensors and state are those of a run that waits, and older ones are removed.

    Tensors to the byte; rows as those of runs that go on (``test_resume.py``).
    """
    kind = KINDS[stage]
    write_records(tmp_path / "set", 24)
    said = {}
    for name, flags in (("waits", ()), ("aside", ("--save-async",))):
        result = kind.run(
            "--data", str(tmp_path / "set"), "--steps", str(STEPS), "--output", str(tmp_path / name),
            "--keep-last", "1", *SIZES, *kind.flags, *flags,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        said[name] = result.stdout
    assert BESIDE not in said["waits"] and said["aside"].count(BESIDE) >= STEPS
    for step in range(1, STEPS + 1):
        folder = tmp_path / "aside" / "checkpoints" / f"step_{step:06d}"
        assert f"saved {folder}" in said["aside"]
    assert_same(*(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("aside", "waits")))
    waits, aside = (tmp_path / name / "checkpoints" for name in ("waits", "aside"))
    assert sorted(path.name for path in aside.iterdir()) == sorted(path.name for path in waits.iterdir())
    newest = f"step_{STEPS:06d}"
    assert state_of(aside / newest) == state_of(waits / newest)
    for path in (waits / newest).glob("*.distcp"):
        assert (aside / newest / path.name).read_bytes() == path.read_bytes(), path.name
