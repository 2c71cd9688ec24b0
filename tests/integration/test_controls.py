"""The controls through the command line: a run that goes on keeps their state, and a collapse ends as they say."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from prism_megatron.observability.metrics import read_metrics

TOOL = Path(__file__).resolve().parents[2] / "tools" / "run_align.py"
SIZES = ("--prompts-per-step", "2", "--rollouts-per-prompt", "3", "--steps", "4")


def run(output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *SIZES, "--output", str(output), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def test_a_run_that_goes_on_replays_probes_and_decides_as_an_unbroken_one(tmp_path: Path) -> None:
    """Claim: from the checkpoint of step 2, steps 3 and 4 have every figure of the uninterrupted run, to 1e-6.

    The replayed answers, the probe set's answers and the accuracy that pauses the discriminator come from the
    checkpoint. Blind spot: a rollback, which ``test_game.py`` and the next test make.
    """
    flags = ("--save-every", "2", "--replay-prompts", "2", "--probe-every", "3", "--pause-discriminator-above", "0.4",
             "--discriminator-updates-per-step", "2", "--stop-gap-band", "1e-3")  # fmt: skip
    whole, part = tmp_path / "whole", tmp_path / "part"
    result = run(whole, *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    (part / "checkpoints").mkdir(parents=True)
    for name in ("metrics.jsonl", "config.yaml", "checkpoints/step_000002"):
        (shutil.copytree if (whole / name).is_dir() else shutil.copy)(whole / name, part / name)
    result = run(part, *flags, "--load", str(part))
    assert result.returncode == 0, result.stdout + result.stderr
    rows, expected = (read_metrics(folder / "metrics.jsonl") for folder in (part, whole))
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[2]["replayed_rollouts"] > 0
    assert rows[3]["probe/perception/pairs"] > 0
    assert {row["discriminator_updates"] for row in expected} == {0, 2}, (
        "blind: the rule to pause never changed its mind"
    )
    for row, wanted in zip(rows, expected, strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            if name != "time" and not name.startswith(("seconds/", "memory/")):
                close = row[name] == value or abs(row[name] - value) <= 1e-6 * max(1.0, abs(value))
                assert close, (row["step"], name, row[name], value)


def test_a_collapse_is_rolled_back_and_then_ends_the_run(tmp_path: Path) -> None:
    """Answers cut after 8 tokens are never valid: two steps, back to the saved start, two more, and one line why."""
    output = tmp_path / "run"
    result = run(output, "--max-response-tokens", "8", "--rollbacks", "1", "--collapse-steps", "2")
    assert result.returncode == 2, result.stdout + result.stderr
    assert "step 3: 2 steps on end had less than 0.1 valid rollouts" in result.stderr
    assert "no rollback is left (--rollbacks 1)" in result.stderr
    assert "Traceback" not in result.stderr
    assert f"policy and discriminator are those of {output / 'checkpoints' / 'step_000000'} again" in result.stdout
    rows = read_metrics(output / "metrics.jsonl")
    assert [row["rolled_back"] for row in rows] == [0, 1, 0]
    assert [row["policy_version"] for row in rows] == [0, 2, 2]
    assert all(row["perception/accuracy"] is None for row in rows)
