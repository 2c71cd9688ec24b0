"""Checks run in processes of their own, which may die or hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prism_megatron.config.tools.gpu_check import GpuCheckConfig, check_gpu_check
from prism_megatron.errors import ConfigError
from prism_megatron.gpu_check import run
from prism_megatron.gpu_check.rows import Row, measured, within
from tests.waiting import wait_for


def _of_three(check: str, config: GpuCheckConfig) -> Iterator[Row]:
    """In place of the checks, in their processes: one dies, one hangs beside a process of its own, one is good."""
    yield measured("before", 1.0, "")
    if check == "attention":
        os.kill(os.getpid(), signal.SIGKILL)
    if check == "layer":
        with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as child:
            (config.output / "child").write_text(str(child.pid))
            child.wait()
    yield within("after", 1.0, 2.0)


def _child_of_three(*arguments: object) -> None:
    """``run._child`` where the checks are those above: a spawned process knows nothing of a test's patches."""
    run._made = _of_three
    _CHILD(*arguments)  # type: ignore[arg-type]


_CHILD = run._child


@pytest.fixture
def of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_child", _child_of_three)


@pytest.mark.usefixtures("of_three")
def test_one_that_dies_takes_no_other_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: what a dead check had found stands beside what ended it, those after it are made, and the files say so."""
    assert not run.run_checks(GpuCheckConfig(only=("head", "attention"), dry=True, output=tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["checks"]
    assert list(written) == ["attention", "head"], "in their own order"
    assert [(row["what"], row["verdict"]) for row in written["attention"]] == [
        ("before", "measured"),
        ("the rest of it", "FAILS"),
    ]
    assert "SIGKILL" in written["attention"][1]["note"]
    assert [row["verdict"] for row in written["head"]] == ["measured", "holds"]
    printed = capsys.readouterr().out
    assert "1 holds, 1 FAILS, 2 measured, 0 skipped" in printed
    assert len((tmp_path / "out" / "table.txt").read_text().splitlines()) == 1 + 4
    assert run.run_checks(GpuCheckConfig(only=("head",), dry=True, output=tmp_path / "good")), "nothing failed"


@pytest.mark.usefixtures("of_three")
def test_one_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    """Claim: at the deadline a check is ended, its processes with it."""
    config = GpuCheckConfig(only=("layer",), dry=True, output=tmp_path)
    rows = run.rows_of("layer", config, deadline=time.monotonic() + 600)
    assert next(rows).what == "before"
    wait_for(lambda: (tmp_path / "child").exists() and bool((tmp_path / "child").read_text()))
    rows.close()  # type: ignore[attr-defined]  # a generator
    pid = int((tmp_path / "child").read_text())
    wait_for(lambda: not _runs(pid))


@pytest.mark.usefixtures("of_three")
def test_one_that_is_not_over_in_time_is_a_failure(tmp_path: Path) -> None:
    """Claim: a deadline in the middle of a check fails it; one before it skips it, by name."""
    config = GpuCheckConfig(only=("layer",), dry=True, output=tmp_path, minutes=0.5)
    late = list(run.rows_of("layer", config, deadline=time.monotonic() + 0.01))
    assert [row.verdict for row in late][-1] == "FAILS"
    assert "raise --minutes" in late[-1].note
    (skipped,) = run.rows_of("layer", config, deadline=time.monotonic() - 1.0)
    assert (skipped.verdict, skipped.note) == ("skipped", "the 0.5 minutes were over")


def test_what_cannot_work_is_said_before_anything_starts(tmp_path: Path) -> None:
    """Claim: no device without --dry, no check, a file in the output's place."""
    check_gpu_check(GpuCheckConfig(dry=True), has_cuda=False)
    check_gpu_check(GpuCheckConfig(), has_cuda=True)
    (tmp_path / "file").touch()
    for config, words in {
        GpuCheckConfig(): "--dry",
        GpuCheckConfig(only=(), dry=True): "--only",
        GpuCheckConfig(dry=True, minutes=0.0): "--minutes",
        GpuCheckConfig(dry=True, output=tmp_path / "file"): "is a file",
    }.items():
        with pytest.raises(ConfigError, match=words):
            check_gpu_check(config, has_cuda=False)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
