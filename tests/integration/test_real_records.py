"""Warm-start, then alignment, on real sets of image questions with the mini: it runs, learns from pairs, and resumes.

The mini knows scenes only, so a short format SFT on each set's own images comes first (``--format-sft``). Blind spot:
whether anything about the sets is learnt; a model of a million parameters cannot.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.experiments.mini import MINI_ALIGN_RECORDS
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.discriminator import DiscriminatorConfig
from prism_megatron.config.stages.warm_start import MINI_WARM_START_RECORDS, GateConfig
from prism_megatron.observability.metrics import read_metrics
from prism_megatron.testing import GlooWorld
from tests.integration.test_align import kill_when
from tests.integration.warm_start_ranks import align, warm_up

TOOLS = Path(__file__).resolve().parents[2] / "tools"
ROLLOUTS = RolloutConfig(prompts_per_step=4, rollouts_per_prompt=8)
FORMAT_STEPS = {"nlvr": 60, "tabmwp": 150, "puzzlevqa": 150}
"""Steps after which the mini keeps the format on a set often enough for pairs in every step."""


@pytest.fixture(scope="module")
def data_sets(shared_dir: Path) -> Path:
    folder = shared_dir / "data"
    if not all((folder / name / "data.jsonl").is_file() for name in FORMAT_STEPS):
        pytest.skip(f"no real records: {', '.join(FORMAT_STEPS)} under {folder}")
    return folder


def assert_learns(rows: list[dict[str, Any]], *, reasoning: bool) -> None:
    """Valid answers, pairs and gradients in every step; without reasoning its figures are null beside a count of 0."""
    for row in rows:
        assert row["valid_rollouts"] == row["perception/pairs"] > 0, row["step"]
        assert row["reasoning/pairs"] == (row["valid_rollouts"] if reasoning else 0)
        assert 0 < row["discriminator_grad_norm"] < 1e3
        assert 0 < row.get("policy_grad_norm", 1.0) < 1e3
        for figure in ("accuracy", "reward_gap", "reference_score", "rollout_score"):
            assert row[f"perception/{figure}"] is not None
            assert (row[f"reasoning/{figure}"] is not None) == reasoning, figure


def assert_consistent(checkpoint: Path, rows: list[dict[str, Any]]) -> None:
    """Both players of the checkpoint took the updates that the rows up to it report: none is ahead of the other."""
    document = json.loads((checkpoint / "state.json").read_text())
    step = document["state"]["step"]
    for role in ("policy", "discriminator"):
        updates = sum(row[f"{role}_updated"] for row in rows[:step])
        assert document["engines"][role]["steps_taken"] == updates == step, role


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(2) as world:
        yield world


@pytest.mark.long
def test_captions_without_solutions_are_learnt_from(data_sets: Path, gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: NLVR, which has no solutions, trains both players by its captions alone, and goes on from a checkpoint."""
    warm, game = tmp_path / "warm", tmp_path / "game"
    rollouts = RolloutConfig(prompts_per_step=4, rollouts_per_prompt=4)
    parallel = ParallelConfig(tp=2)
    asked = replace(
        MINI_WARM_START_RECORDS,
        parallel=parallel,
        data=replace(MINI_WARM_START_RECORDS.data, data=data_sets / "nlvr", format_sft=40),
        rollout=rollouts,
        gate=GateConfig(gate_prompts=2, gate_rollouts=2),
        checkpoint=CheckpointConfig(output=warm),
        steps=1,
    )
    assert gloo.run(warm_up, asked, parallel=parallel) == ["", ""]
    assert_learns(read_metrics(warm / "metrics.jsonl"), reasoning=False)
    held_out = json.loads((warm / "summary.json").read_text())["held_out"]
    assert held_out["perception/reference_count"] == 2
    assert (held_out["reasoning/pairs"], held_out["reasoning/accuracy"]) == (0, None)

    play = replace(
        MINI_ALIGN_RECORDS,
        parallel=parallel,
        model=ModelConfig(model=str(warm / "format_sft")),
        data=replace(MINI_ALIGN_RECORDS.data, data=data_sets / "nlvr", format_sft=0),
        rollout=rollouts,
        discriminator=DiscriminatorConfig(discriminator=str(warm / "hf")),
        checkpoint=CheckpointConfig(output=game),
        steps=1,
    )
    gloo.run(align, play, parallel=parallel)
    further: AlignConfig = replace(play, steps=2, checkpoint=replace(play.checkpoint, load=game))
    gloo.run(align, further, parallel=parallel)
    rows = read_metrics(game / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert_learns(rows, reasoning=False)
    for step in (1, 2):
        assert_consistent(game / "checkpoints" / f"step_{step:06d}", rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMAT_STEPS)
def test_a_real_set_from_warm_start_to_resumed_alignment(name: str, data_sets: Path, tmp_path: Path) -> None:
    """Claim: at TP2·PP2, with a SIGKILL amid the 20 steps of alignment, all 20 come out and no player is ahead."""
    warm, game = tmp_path / "warm", tmp_path / "game"
    common = ["--data", str(data_sets / name), "--tp", "2", "--pp", "2", "--prompts-per-step", "4"]
    run("run_warm_start.py", *common, "--output", str(warm), "--format-sft", str(FORMAT_STEPS[name]), "--steps", "5",
        "--rollouts-per-prompt", "8", "--gate-prompts", "4", "--gate-rollouts", "4")  # fmt: skip
    assert_learns(read_metrics(warm / "metrics.jsonl"), reasoning=name != "nlvr")

    command = [
        *("run_align.py", *common, "--output", str(game), "--model", str(warm / "format_sft")),
        *("--discriminator", str(warm / "hf"), "--rollouts-per-prompt", "8", "--steps", "20", "--save-every", "5"),
        *("--system-prompt", "None", "--max-response-tokens", "320", "--tokens-per-microbatch", "2048"),
        *("--policy.lr", "5e-5", "--discriminator.lr", "5e-4", "--discriminator.beta2", "0.95"),
    ]
    checkpoints = game / "checkpoints"
    arguments = [sys.executable, str(TOOLS / command[0]), *command[1:]]
    kill_when(arguments, lambda: len(read_rows(game)) >= 7, timeout_s=1800.0)
    newest = max(checkpoints.glob("step_*"))
    assert_consistent(newest, read_rows(game))
    run(*command, "--load", str(game))
    rows = read_rows(game)
    assert [row["step"] for row in rows] == list(range(20))
    assert_learns(rows, reasoning=name != "nlvr")
    assert_consistent(checkpoints / "step_000020", rows)
    totals = {key: sum(row[key] for row in rows) for key in ("valid_rollouts", "rollouts", "perception/pairs")}
    print(name, totals, json.loads((game / "summary.json").read_text())["largest_grad_norm"])


def read_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return read_metrics(path) if path.is_file() else []


def run(tool: str, *flags: str) -> None:
    result = subprocess.run(
        [sys.executable, str(TOOLS / tool), *flags], capture_output=True, text=True, timeout=3000, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
