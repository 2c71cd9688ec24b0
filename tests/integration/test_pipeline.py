"""A very short real pipeline, killed at random moments: what it comes to is what one that was left alone comes to.

Blind spot: a kill between two writes of one file; warm-start and alignment, which resume as ``test_resume.py`` shows.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from prism_megatron.observability.metrics import read_metrics
from prism_megatron.pipeline.state import STATE
from tests.conftest import REPOSITORY, SEED
from tests.integration.test_resume import CLOCKS
from tests.waiting import wait_for

FILE = """
stages:
  sft:
    tool: sft
    steps: 2
    drift_scenes: 0
    data: {rows_per_step: 2}
    checkpoint: {save_every: 1}
  select:
    tool: select_prompts
    model: "@sft"
    scenes: 4
    mini: habits
    rollout: {prompts_per_step: 2, rollouts_per_prompt: 4}
    keep_from: 0.0
    keep_to: 1.0
  rlvr:
    tool: rlvr
    model: {mini: habits, model: "@sft"}
    prompts: "@select/selected.jsonl"
    exam: {eval_prompts: 0}
    steps: 2
    rollout: {prompts_per_step: 2, rollouts_per_prompt: 2}
    checkpoint: {save_every: 1}
evaluate: {scenes: 4, samples: 1, system_prompt: null, max_response_tokens: 96, questions_at_once: 2}
"""
STEPS = ("evaluations/base", "stages/sft", "evaluations/sft", "stages/select", "stages/rlvr", "evaluations/rlvr")
KILLS = 3
FOUND = ("metrics.jsonl", "pass_rates.jsonl", "answers.jsonl")


def command(folder: Path, text: str = FILE) -> list[str]:
    (folder / "pipeline.yaml").write_text(text)
    tool = str(REPOSITORY / "tools" / "run_pipeline.py")
    return [sys.executable, tool, "--config", str(folder / "pipeline.yaml"), "--output", str(folder / "run"),
            "--resume", "auto"]  # fmt: skip


def played(folder: Path, text: str = FILE) -> list[str]:
    """The steps that one command played to their end."""
    done = subprocess.run(command(folder, text), capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    names = {
        f"{'stage' if key.startswith('stages') else 'evaluation of'} {key.partition('/')[2]}": key for key in STEPS
    }
    return [key for name, key in names.items() if f"pipeline: {name}: done after" in done.stdout]


def report(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "run" / "report.json").read_text())
    assert set(document.pop("minutes")) == set(STEPS)
    return document


def rows(folder: Path, stage: str) -> list[dict[str, Any]]:
    found = read_metrics(folder / "run" / "stages" / stage / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(CLOCKS)} for row in found]


def kill(folder: Path, key: str, lines: int) -> None:
    """End a command by SIGKILL once it has begun that step and written so many lines of what it finds out there, or has
    ended; nothing outlives it."""
    process = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def is_there() -> bool:
        path = folder / "run" / STATE
        if not path.exists() or key not in json.loads(path.read_text()):
            return False
        return (
            sum(one.read_bytes().count(b"\n") for name in FOUND for one in (folder / "run" / key).glob(name)) >= lines
        )

    wait_for(lambda: process.poll() is not None or is_there(), seconds=600, poll_seconds=0.05)
    family = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_killed_and_left_alone_come_to_the_same(tmp_path: Path) -> None:
    """Claim: rows and report are equal; then a changed section replays its stage and what uses it, and no more."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert played(whole) == list(STEPS)
    moments = random.Random(SEED)
    for key in sorted(moments.sample(STEPS, KILLS), key=STEPS.index):
        kill(killed, key, moments.randrange(3))
    played(killed)
    assert report(killed) == report(whole)
    for stage in ("sft", "rlvr"):
        assert rows(killed, stage) == rows(whole, stage) and len(rows(whole, stage)) == 2
    for name in ("stages/select/selected.jsonl", "evaluations/rlvr/answers.jsonl"):
        assert (killed / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()
    assert played(whole) == []
    longer = FILE.replace("exam: {eval_prompts: 0}\n    steps: 2", "exam: {eval_prompts: 0}\n    steps: 1")
    assert longer != FILE
    assert played(whole, longer) == ["stages/rlvr", "evaluations/rlvr"]
    assert len(rows(whole, "rlvr")) == 1
