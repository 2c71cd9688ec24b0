"""Reinforcement learning from verifiable rewards through its command line.

Blind spot: how much a real model learns; the mini world's figures are in ``docs/mini_world.md``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.observability.metrics import read_metrics
from tests.integration.test_align_records import write_records
from tests.integration.test_resume import assert_same
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "run_rlvr.py"
SIZES = ("--prompts-per-step", "4", "--rollouts-per-prompt", "4", "--eval-prompts", "6", "--eval-rollouts", "2",
         "--save-every", "1", "--dtype", "fp32")  # fmt: skip
STEPS = 4
SEARCHING = ("--algo", "gspo", "--dynamic-sampling", "--max-batches", "3", "--steps", str(STEPS), "--eval-every", "2")
ALIKE = ("--format-sft", "0", "--reward-preset", "sum", "--eval-prompts", "0", "--dynamic-sampling",
         "--max-batches", "2", "--steps", "2",
         "--max-response-tokens", "24")  # fmt: skip
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(*flags: str, ranks: int = 1) -> list[str]:
    outer = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *outer, str(TOOL), *flags]


def run(*flags: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*flags, ranks=ranks), capture_output=True, text=True, timeout=400, check=False, env=ENVIRONMENT
    )


def ran(*flags: str, ranks: int = 1) -> str:
    result = run(*flags, ranks=ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "metrics.jsonl")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GSPO on scenes with dynamic sampling: several mini-batches, several batches of prompts a step."""
    folder = tmp_path_factory.mktemp("rlvr") / "run"
    ran(*SIZES, *SEARCHING, "--output", str(folder))
    return folder


def test_a_run_learns_evaluates_and_exports(played: Path) -> None:
    rows = rows_of(played)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert all(row["groups"] >= 4 * row["groups/batches"] and row["groups/learned"] <= 4 for row in rows)
    learned = [row for row in rows if row["groups/learned"]]
    assert learned and all(row["policy_updated"] == 1 and row["policy_updates"] == 4 for row in learned)
    assert any(row["clip/low_share"] + row["clip/high_share"] > 0 for row in learned), "no clip ever binds"
    assert all("eval/sampled/accuracy" in row for row in rows), "every checkpoint is asked"
    summary = json.loads((played / "summary.json").read_text())
    assert summary["held_out"]["greedy/accuracy"]["before"][0] >= 0 and summary["ended"] == "done"
    assert (played / "hf" / "model.safetensors").is_file()
    report = (played / "report.html").read_text()
    assert "Right answers" in report and "of 4 are right" in report


def test_a_killed_run_goes_on_as_itself(played: Path, tmp_path: Path) -> None:
    """Claim: prompts, rewards, updates and held-out answers are those of the run that was not interrupted (1e-6)."""
    folder, seed = tmp_path / "run", random.Random(int(os.environ.get("PRISM_TEST_SEED", "20260")))
    process = subprocess.Popen(
        command(*SIZES, *SEARCHING, "--output", str(folder)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    after = seed.randrange(1, STEPS)
    saved = folder / "checkpoints" / f"step_{after:06d}" / "state.json"
    wait_for(lambda: saved.is_file() or process.poll() is not None, seconds=300.0)
    process.kill()
    _, errors = process.communicate()
    assert saved.is_file(), errors
    ran("--load", str(folder))
    assert_same(rows_of(folder), rows_of(played))


@pytest.mark.long
def test_another_layout_draws_and_learns_the_same(played: Path, tmp_path: Path) -> None:
    """Claim: one rank's run goes on with TP2·DP2: the same prompts and answers, and losses within 1e-3 (sums)."""
    shutil.copytree(played, tmp_path / "run")
    for step in range(2, STEPS + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:06d}")
    ran("--load", str(tmp_path / "run"), "--tp", "2", "--steps", "2", ranks=4)
    after, expected = rows_of(tmp_path / "run")[1], rows_of(played)[1]
    for name in ("reward/accuracy", "groups/batches", "groups/mixed", "response_tokens"):
        assert after[name] == expected[name], name
    assert after["policy_loss"] == pytest.approx(expected["policy_loss"], abs=1e-3)


@pytest.mark.long
def test_a_reference_that_was_taught_comes_back(tmp_path: Path) -> None:
    """Claim: a run that goes on is held near to the policy that was taught the format, as before it was interrupted."""
    write_records(tmp_path / "set", 16)
    flags = (*SIZES, "--data", str(tmp_path / "set"), "--algo", "grpo", "--format-sft", "4", "--steps", "3",
             "--eval-prompts", "0", "--max-response-tokens", "320", "--policy.lr", "1e-3",
             "--reward-preset", "sum", "--reward", "tests.integration.rewards_for_rlvr:by_record")  # fmt: skip
    ran(*flags, "--output", str(tmp_path / "whole"))
    whole = rows_of(tmp_path / "whole")
    assert whole[2]["kl/reference"] > 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:06d}")
    ran("--load", str(tmp_path / "run"))
    assert_same(rows_of(tmp_path / "run"), whole)


@pytest.mark.long
def test_ranks_that_find_nothing_wait_for_nobody(tmp_path: Path) -> None:
    """Claim: on four ranks, two of which draw only answers of equal worth, steps learn from the others' groups."""
    write_records(tmp_path / "set", 16)
    out = ran(*SIZES, *ALIKE, "--data", str(tmp_path / "set"), "--reward",
              "tests.integration.rewards_for_rlvr:by_record", "--output", str(tmp_path / "run"), ranks=4)  # fmt: skip
    rows = rows_of(tmp_path / "run")
    assert all(row["groups/batches"] <= 2 for row in rows)
    assert any(row["groups/learned"] > 0 for row in rows), out


@pytest.mark.long
def test_a_step_that_finds_nothing_ends_within_its_bound(tmp_path: Path) -> None:
    """Claim: on four ranks, where answers never differ, two batches are asked, and one line says so."""
    write_records(tmp_path / "set", 16)
    result = run(*SIZES, *ALIKE, "--data", str(tmp_path / "set"), "--max-idle-steps", "1", "--reward",
                 "tests.integration.rewards_for_rlvr:never", "--output", str(tmp_path / "run"), ranks=4)  # fmt: skip
    assert result.returncode != 0, result.stdout
    assert "0 of 4 groups after 2 batches of prompts" in result.stdout, result.stdout + result.stderr
    assert result.stdout.count("groups after 2 batches") == 1
    assert "different worth" in result.stderr


def test_what_cannot_work_is_one_line(tmp_path: Path) -> None:
    for flags, words in (
        (("--algo", "ppo"), "there is no --algo ppo; choose one of grpo"),
        (("--max-batches", "3"), "--max-batches is for --dynamic-sampling"),
        (("--overlong-buffer", "97"), "--overlong-buffer 97 is more than the 96 of --max-response-tokens"),
        (("--rollouts-per-prompt", "1"), "--rollouts-per-prompt is 1"),
        (("--mini-batches", "300"), "cannot be 300 --mini-batches"),
        (("--format-sft", "3"), "--format-sft trains on records"),
        (("--reward", "no.such:function"), "--reward no.such:function: it is not found"),
        (("--correction", "token-truncate", "--top-p", "0.9"), "--top-p 0.9 samples from a part of it"),
        (("--rollout-ahead", "1"), "--rollout-ahead 1 generates while a step trains"),
    ):
        result = run(*SIZES, *flags, "--output", str(tmp_path / "run"))
        assert result.returncode in (1, 2) and "Traceback" not in result.stderr, result.stdout + result.stderr
        assert words in result.stderr, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert not (tmp_path / "run").exists()
