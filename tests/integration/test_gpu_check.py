"""``make gpu-check ARGS=--dry``: everything but the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_all_checks_run_on_a_cpu(tmp_path: Path) -> None:
    """Claim: every check is made, nothing fails, and what a CPU lacks is skipped with a reason."""
    command = [sys.executable, str(ROOT / "tools/gpu_check.py"), "--dry", "--minutes", "30", "--output", "out"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    checks = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["checks"]
    assert list(checks) == ["parity", "attention", "layer", "experts", "head", "memory", "align"]
    for name, rows in checks.items():
        verdicts = {row["verdict"] for row in rows}
        assert "FAILS" not in verdicts, rows
        assert verdicts & {"holds", "measured"}, name
        assert all(row["note"] for row in rows if row["verdict"] == "skipped")
    assert (tmp_path / "out" / "table.txt").read_text().count("\n") == 1 + sum(map(len, checks.values()))


def test_without_a_device_it_is_one_line() -> None:
    """Claim: where torch sees no CUDA device, the error says what can be tried."""
    ended = subprocess.run(
        [sys.executable, ROOT / "tools/gpu_check.py"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: there is no CUDA device") and "--dry" in line
