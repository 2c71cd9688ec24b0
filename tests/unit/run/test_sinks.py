"""Rows in TensorBoard and W&B, read back from the files that they write; and that neither can end a run.

Blind spot: W&B's server.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.errors import ConfigError
from prism_megatron.run import sinks
from prism_megatron.run.record import RunRecord
from prism_megatron.run.sinks import Forgiving, check_sinks, numbers, open_sinks

ROOT = Path(__file__).resolve().parents[3]
RECORD = RunRecord("ab" * 16, "align", "t", "2026-11-28T22:58:29Z", 9, 1, {}, {})


def row(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "policy_loss": loss, "perception/auc": None, "time": "2026-11-28T22:58:29Z"}


def test_what_has_no_number_is_left_out() -> None:
    assert numbers(row(3, 0.5)) == {"step": 3, "policy_loss": 0.5}


def test_a_missing_package_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"wandb"}
    monkeypatch.setattr(sinks, "find_spec", lambda name: name if name in found else None)
    check_sinks(["wandb"])
    with pytest.raises(ConfigError, match=r"--log-to tensorboard .*pip install -e \.\[tensorboard\]"):
        check_sinks(["wandb", "tensorboard"])


class Broken:
    """Fails from some row on."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.written: list[int] = []

    def write(self, row: Any) -> None:
        if row["step"] > self.last:
            raise ConnectionError("no\nnetwork")
        self.written.append(row["step"])

    def close(self) -> None:
        raise ConnectionError("still none")


def test_a_sink_that_fails_is_one_line_and_gets_no_more() -> None:
    said: list[str] = []
    broken = Broken(last=1)
    sink = Forgiving("wandb", lambda: broken, said.append)
    for step in range(5):
        sink.write(row(step, 0.0))
    sink.close()
    assert broken.written == [0, 1]
    assert said == ["WARNING: --log-to wandb gets no more rows (no network); metrics.jsonl has all of them"]


def test_a_sink_that_cannot_be_opened_or_closed_is_one_line() -> None:
    said: list[str] = []

    def refuse() -> Any:
        raise ValueError

    sink = Forgiving("wandb", refuse, said.append)
    sink.write(row(0, 0.0))
    sink.close()
    other = Forgiving("tensorboard", lambda: Broken(9), said.append)
    other.close()
    other.close()
    assert [line.split("(")[1].split(")")[0] for line in said] == ["ValueError", "still none"]


def opened(name: Any, folder: Path, said: list[str], *, first_step: int = 0) -> Any:
    (sink,) = open_sinks(
        [name], folder=folder, record=RECORD, first_step=first_step, run_name=None, config={"steps": 4}, say=said.append
    )
    return sink


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_the_rows_and_those_that_came_again_once(tmp_path: Path) -> None:
    said: list[str] = []
    for first, last, loss in ((0, 4, 0.5), (2, 5, 0.25)):
        sink = opened("tensorboard", tmp_path, said, first_step=first)
        for step in range(first, last):
            sink.write(row(step, loss))
        sink.close()
    expected = [(0, 0.5), (1, 0.5), (2, 0.25), (3, 0.25), (4, 0.25)]
    assert scalars(tmp_path / "tensorboard", "policy_loss") == expected
    assert said == []


WANDB_PROGRAM = """
import sys
from pathlib import Path
from tests.unit.run.test_sinks import opened, row
said, folder = [], Path(sys.argv[1])
sink = opened("wandb", folder, said)
for step in range(3):
    sink.write(row(step, step / 2))
(folder / "report.html").write_text("<html>the report</html>")
sink.close()
assert said == [], said
"""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_has_the_rows_the_configuration_and_the_report(tmp_path: Path) -> None:
    """Offline, in a process of its own. The run has our id, so that one that goes on is the same."""
    from tests.wandb_file import records

    folder = tmp_path / "first [run]"
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {
        "WANDB_MODE": "offline",
        "PYTHONPATH": os.pathsep.join((str(ROOT), environment.get("PYTHONPATH", ""))),
    }
    result = subprocess.run(
        [sys.executable, "-c", WANDB_PROGRAM, str(folder)], env=environment, cwd=tmp_path, timeout=240,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert path.name == f"run-{RECORD.id}.wandb"
    losses, name, files = [], "", []
    config: dict[str, str] = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if "policy_loss" in items:
                losses.append((items["step"], items["policy_loss"]))
        elif kind == "run":
            name = record.run.display_name
            config |= {item.key: item.value_json for item in record.run.config.update}
        elif kind == "files":
            files += [file.path for file in record.files.files]
    assert losses == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert name == "first [run]"
    assert config["steps"] == "4"
    (report,) = [file for file in files if file.endswith(".html")]
    assert "the report" in next(folder.glob(f"wandb/offline-run-*/files/{report}")).read_text()
