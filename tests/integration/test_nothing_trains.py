"""A run in which nothing trains says why in its first steps, ends by a status of its own, and calls nothing aligned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.observability.metrics import read_metrics
from tests.integration.test_align_records import write_records

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SIZES = ("--prompts-per-step", "2", "--rollouts-per-prompt", "2", "--dtype", "fp32", "--save-every", "100")
NOTHING_TRAINS = 4


def run(tool: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOLS / tool), *SIZES, *flags], capture_output=True, text=True, timeout=300, check=False
    )


def assert_ended(result: subprocess.CompletedProcess[str], output: Path, *, role: str, why: str) -> None:
    """By its status and in one line, with summary and rows, and no export that would pass for one."""
    assert result.returncode == NOTHING_TRAINS, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert f"the {role} learned nothing in the last 3 steps (--max-idle-steps): " in line
    assert why in line
    assert "WARNING: the " in result.stdout and why in result.stdout.partition("2/9 |")[0]
    assert len(read_metrics(output / "metrics.jsonl")) == 3
    assert "learned nothing" in json.loads((output / "summary.json").read_text())["ended"]
    assert not (output / "hf").exists()
    assert "aligned" not in result.stdout and "warmed-up" not in result.stdout


def test_data_of_which_no_answer_is_ever_valid(tmp_path: Path) -> None:
    """The mini has not learnt this prompt's format in so few tokens; the broken rule is named, and an answer shown."""
    write_records(tmp_path / "set", 12)
    flags = ("--data", str(tmp_path / "set"), "--format-sft", "0", "--max-response-tokens", "80", "--temperature", "4",
             "--steps", "9", "--max-idle-steps", "3", "--output", str(tmp_path / "run"))  # fmt: skip
    result = run("run_align.py", *flags)
    assert_ended(result, tmp_path / "run", role="policy", why="none of 4 answers keeps the format (")
    assert "; one of them: " in result.stderr


@pytest.mark.long
def test_a_warm_start_without_pairs(tmp_path: Path) -> None:
    flags = ("--temperature", "4", "--steps", "9", "--max-idle-steps", "3", "--min-auc", "0")
    result = run("run_warm_start.py", *flags, "--output", str(tmp_path / "run"))
    assert_ended(result, tmp_path / "run", role="discriminator", why="none of 4 answers keeps the format (")


@pytest.mark.long
def test_a_policy_that_collapses(tmp_path: Path) -> None:
    """Claim: a learning rate that ruins the policy ends the run in as many steps as were allowed, not at its end."""
    flags = ("--policy.lr", "0.1", "--steps", "40", "--max-idle-steps", "3", "--output", str(tmp_path / "run"))
    result = run("run_align.py", *flags)
    assert result.returncode == NOTHING_TRAINS, result.stdout + result.stderr
    assert "learned nothing in the last 3 steps" in result.stderr
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 20


def test_a_policy_that_rests_on_purpose_is_exported_as_what_it_is(tmp_path: Path) -> None:
    """Claim: a control experiment is no failure, and its export says that no update touched it."""
    result = run("run_align.py", "--freeze-policy", "--steps", "2", "--output", str(tmp_path / "run"))
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["exported"] == "policy as it came (no update touched it)" and summary["ended"] == "done"
    assert "exporting the policy as it came (no update touched it)" in result.stdout
    before, after = (
        load_file(folder / "model.safetensors") for folder in (MINI_FOLDER / "policy", tmp_path / "run" / "hf")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].float(), after[name].float()) for name in before)


def test_a_policy_that_learnt_is_exported_as_aligned(tmp_path: Path) -> None:
    result = run("run_align.py", "--steps", "1", "--output", str(tmp_path / "run"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["exported"] == "aligned policy"


@pytest.mark.long
def test_too_few_steps_to_reach_the_limit_are_no_success_either(tmp_path: Path) -> None:
    steps = 2
    flags = ("--temperature", "4", "--steps", str(steps), "--output", str(tmp_path / "run"))
    result = run("run_align.py", *flags)
    assert result.returncode == NOTHING_TRAINS, result.stdout + result.stderr
    assert f"no step of {steps} trained the policy: none of 4 answers keeps the format" in result.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    ("role", "why"),
    [("policy", "policy version 1 gives logits that are not finite"),
     ("discriminator", "the discriminator's scores are not finite")],
)  # fmt: skip
def test_numbers_that_are_none_any_more_end_a_run(tmp_path: Path, role: str, why: str) -> None:
    """Claim: an update of a size that no float holds ends the run at the next look, in one line, without an export."""
    flags = (f"--{role}.lr", "1e30", f"--{role}.clip-grad", "0", "--steps", "9", "--output", str(tmp_path / "run"))
    result = run("run_align.py", *flags)
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert why in line and "go on with `" in line
    assert not (tmp_path / "run" / "hf").exists() and "aligned" not in result.stdout
    assert "not finite" in json.loads((tmp_path / "run" / "summary.json").read_text())["ended"]
