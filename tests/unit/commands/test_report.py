"""Both files are made again from what a run left, however it ended, without torch; its table is watched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.commands import report
from prism_megatron.evaluation.sample import Sample, write_samples
from prism_megatron.observability.metrics import MetricsWriter
from prism_megatron.run.record import RunRecord, write_record
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[3]
RECORD = RunRecord(
    "ab" * 16, "align", "Alignment of a test", "2026-11-28T22:58:29Z", 9, 4, {"tp": 4}, {"torch": "2.13"}
)


def row(step: int) -> dict[str, Any]:
    return {"step": step, "policy_version": step, "valid_share": 0.5, "rollouts": 4, "seconds/rollout": 1.0}


def played(folder: Path, steps: int = 3, record: RunRecord | None = RECORD) -> Path:
    writer = MetricsWriter(folder / "metrics.jsonl", first_step=0)
    for step in range(steps):
        writer.write(row(step))
    writer.close()
    if record is not None:
        write_record(folder / "run.json", record)
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return document


def test_a_killed_run_gets_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_samples(tmp_path / "samples.json", [Sample([], "How many?", "an answer", "a reference", None)])
    assert report.main([str(played(tmp_path))]) == 0
    summary = summary_of(tmp_path)
    assert (summary["steps"], summary["world_size"], summary["torch"], summary["ended"]) == (3, 4, "2.13", None)
    page = (tmp_path / "report.html").read_text()
    assert "Alignment of a test" in page
    assert "an answer" in page
    assert capsys.readouterr().out.splitlines()[-1].endswith("report.html: 3 steps")


def test_what_only_the_run_knew_stays(tmp_path: Path) -> None:
    seconds = {"build": 7, "rollout": 2}
    before = {"ended": "all played", "exported": "Policy", "hf_export": "hf", "seconds_by_phase": seconds}
    (tmp_path / "summary.json").write_text(json.dumps(before))
    report.main([str(played(tmp_path))])
    summary = summary_of(tmp_path)
    assert [summary[key] for key in ("ended", "exported", "hf_export")] == ["all played", "Policy", "hf"]
    assert summary["seconds_by_phase"] == {"build": 7, "rollout": 3.0}


def test_an_older_run_is_reported_and_what_is_missing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(played(tmp_path, record=None))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("run.json is missing")
    assert lines[1].startswith("samples.json is missing")
    assert summary_of(tmp_path)["world_size"] is None
    assert "Towers agree" in (tmp_path / "report.html").read_text(), "only alignment has policies of several versions"


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("run.json", "{", "run.json is damaged"),
        ("samples.json", "[7]", "samples.json is damaged"),
        ("summary.json", "[", "summary.json is damaged"),
        ("metrics.jsonl", "x\n", "metrics.jsonl, line 1: not JSON"),
    ],
)
def test_a_damaged_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str, problem: str
) -> None:
    (played(tmp_path) / file).write_text(text)
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_a_stage_that_nobody_knows_and_a_folder_that_is_no_run_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "is no run's folder" in capsys.readouterr().err
    unknown = RunRecord("ab" * 16, "dance", "t", "c", 1, 1, {}, {})
    assert report.main([str(played(tmp_path, record=unknown))]) == 2
    assert "stage 'dance'" in capsys.readouterr().err


def test_a_run_that_has_ended_is_shown_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    played(tmp_path)
    (tmp_path / "summary.json").write_text('{"ended": "all steps are played"}')
    assert report.main([str(tmp_path), "--follow"]) == 0
    shown = capsys.readouterr().out
    assert "3/9 |" in shown
    assert "the run has ended after 3 steps: all steps are played" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "run.json", "summary.json"]


def test_ctrl_c_ends_the_watching_without_a_traceback_and_torch_is_not_needed(tmp_path: Path) -> None:
    """In a process of its own, in which torch cannot be imported."""
    played(tmp_path)
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise AssertionError('torch was imported')")
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("w") as out_file, err.open("w") as err_file:
        process = subprocess.Popen(
            [sys.executable, "tools/report.py", str(tmp_path), "--follow"],
            cwd=ROOT, stdout=out_file, stderr=err_file, env={**os.environ, "PYTHONPATH": str(blocked)},
        )  # fmt: skip
        try:
            wait_for(lambda: "3/9 |" in out.read_text() or process.poll() is not None)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
            process.wait()
    assert err.read_text() == ""


@pytest.mark.parametrize(
    ("summary", "line"),
    [
        ('{"seconds_by_phase": null}', ""),
        ('{"layout": [1]}', ""),
        ("{}", '{"step": 3, "rollouts": [1], "valid_share": {}, "seconds/rollout": "x"}\n'),
        ("{}", '{"step": 3, "response_tokens": 1' + "0" * 400 + "}\n"),
        ("[" * 5000 + "]" * 5000, ""),
    ],
)
def test_files_that_no_run_wrote_are_one_line(
    summary: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: read, or refused in a line; never a traceback."""
    folder = played(tmp_path, record=None)
    (tmp_path / "summary.json").write_text(summary)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line)
    status = report.main([str(folder)])
    errors = capsys.readouterr().err
    assert status == 0 or (status == 2 and len(errors.splitlines()) == 1 and errors.startswith("error: "))
