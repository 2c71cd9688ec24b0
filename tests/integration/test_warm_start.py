"""The warm-start on the shipped mini: pairs sampled and read back, artefacts, gate, layouts, resume after a kill.

Blind spot: whether the recipe trains a useful discriminator; its own gate says so when it runs in full.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from model_providers.moe_discriminator.folder import read_variant
from model_providers.moe_discriminator.variant import Variant
from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.stages.warm_start import (
    MINI_WARM_START,
    MINI_WARM_START_PAIRS,
    GateConfig,
    PairsConfig,
    WarmStartConfig,
    check_warm_start,
)
from prism_megatron.data.pairs import read_pairs
from prism_megatron.observability.metrics import read_metrics
from prism_megatron.testing import GlooWorld
from tests.integration.test_align import kill_when
from tests.integration.warm_start_ranks import discriminator_hash, warm_up
from tests.mini_experts import write_mini_with_experts

TOOL = Path(__file__).resolve().parents[2] / "tools" / "run_warm_start.py"
STEPS, PROMPTS, ROLLOUTS = 4, 4, 2
FLAGS = (
    *("--steps", str(STEPS), "--prompts-per-step", str(PROMPTS), "--rollouts-per-prompt", str(ROLLOUTS)),
    *("--save-every", "2", "--gate-prompts", "2", "--gate-rollouts", "4", "--min-auc", "0"),
)
FIGURES = (
    "discriminator_loss",
    "discriminator_grad_norm",
    "discriminator_lr",
    "perception/reward_gap",
    "perception/pairs",
)


def config(output: Path, **changes: object) -> WarmStartConfig:
    """What ``FLAGS`` ask the tool for."""
    small = replace(
        MINI_WARM_START,
        rollout=replace(MINI_WARM_START.rollout, prompts_per_step=PROMPTS, rollouts_per_prompt=ROLLOUTS),
        checkpoint=CheckpointConfig(output=output, save_every=2),
        gate=GateConfig(gate_prompts=2, gate_rollouts=4),
        steps=STEPS,
    )
    return replace(small, **changes)  # type: ignore[arg-type]  # the test names fields and values that fit


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


@pytest.fixture(scope="module")
def finished(gloo: GlooWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run of one process, whose samples are written."""
    output = tmp_path_factory.mktemp("warm") / "run"
    asked = config(output, pairs=PairsConfig(write_pairs=output.parent / "pairs" / "pairs.jsonl"))
    assert gloo.run(warm_up, asked, num_ranks=1) == [""]
    return output


def assert_same_steps(one: Path, other: Path, *, relative: float) -> None:
    rows, expected = (read_metrics(folder / "metrics.jsonl") for folder in (one, other))
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == list(range(STEPS))
    for row, wanted in zip(rows, expected, strict=True):
        for key in FIGURES:
            assert row[key] == pytest.approx(wanted[key], rel=relative, abs=relative), (row["step"], key)


def test_every_step_trains_on_every_valid_sample(finished: Path) -> None:
    """Counts beside shares, the cosine after its warm-up, and a fresh discriminator that knows nothing yet."""
    rows = read_metrics(finished / "metrics.jsonl")
    for row in rows:
        assert row["rollouts"] == PROMPTS * ROLLOUTS
        assert 0 < row["perception/pairs"] == row["reasoning/pairs"] == row["valid_rollouts"]
        assert 0 < row["discriminator_grad_norm"] < 1e3
        assert row["perception/auc_pairs"] == 0 or 0 <= row["perception/auc"] <= 1
    optimizer = MINI_WARM_START.discriminator_optimizer
    assert [row["discriminator_lr"] for row in rows] == [optimizer.lr_at(step, STEPS) for step in range(STEPS)]
    # Both pair losses of a random head start near log 2, and the regulariser of small scores near 0.
    assert rows[0]["discriminator_loss"] == pytest.approx(2 * math.log(2), abs=0.1)


def test_the_run_leaves_a_discriminator_to_align_against(finished: Path, gloo: GlooWorld) -> None:
    """Claim: the folder and the last checkpoint hold the same weights, not those of the checkpoint before."""
    assert read_variant(finished / "hf") == Variant.of(MINI_WARM_START.discriminator)
    last, before = (finished / "checkpoints" / f"step_{step:06d}" for step in (STEPS, STEPS - 2))
    hashes = [gloo.run(discriminator_hash, folder, num_ranks=1)[0] for folder in (finished / "hf", last, before)]
    assert hashes[0] == hashes[1] != hashes[2]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["held_out"]["perception/pairs"] > 0
    assert summary["hf_export"] == str(finished / "hf")
    page = (finished / "report.html").read_text()
    assert "Warm-start of a discriminator" in page
    assert "Held out" in page
    assert page.count("<article>") > 0
    assert "exporting the warmed-up discriminator" in (finished / "console.log").read_text()


def test_another_layout_takes_the_same_steps_and_a_gate_fails_at_the_end(
    finished: Path, gloo: GlooWorld, tmp_path: Path
) -> None:
    """Claim: TP2·PP2 samples and learns the same up to rounding; below the gate all is saved, then the run fails."""
    asked = config(
        tmp_path / "run", parallel=ParallelConfig(tp=2, pp=2), gate=replace(config(tmp_path).gate, min_accuracy=1.0)
    )
    messages = gloo.run(warm_up, asked, parallel=asked.parallel)
    assert all("below --min-accuracy 1 (" in message and "lower the gate" in message for message in messages)
    assert_same_steps(tmp_path / "run", finished, relative=1e-4)
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
    held_out = [
        json.loads((folder / "summary.json").read_text())["held_out"] for folder in (tmp_path / "run", finished)
    ]
    assert held_out[0]["reasoning/reward_gap"] == pytest.approx(held_out[1]["reasoning/reward_gap"], rel=1e-3)


def test_a_policy_with_experts_warms_up_a_dense_models_discriminator(
    finished: Path, gloo: GlooWorld, tmp_path: Path
) -> None:
    """Claim: it samples at EP2 with weights that its folder stores in another layout than the embedded engine takes.

    The discriminator is one that an earlier warm-start left. Blind to the samples' log-probs, which ``test_game.py``
    compares.
    """
    folder, judge = write_mini_with_experts(tmp_path / "policy", "hub"), finished / "hf"
    asked = config(
        tmp_path / "run",
        parallel=ParallelConfig(ep=2),
        model=ModelConfig(str(folder), dtype="fp32"),
        discriminator=replace(MINI_WARM_START.discriminator, discriminator=str(judge)),
        steps=1,
    )
    shapes = [Qwen3VLShape.from_folder(one) for one in (folder, judge)]
    check_warm_start(asked, shapes[0], world_size=2, discriminator=shapes[1])
    assert gloo.run(warm_up, asked, parallel=asked.parallel, num_ranks=2) == ["", ""]
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["perception/pairs"] == row["valid_rollouts"] > 0
    assert row["discriminator_grad_norm"] > 0


def test_written_pairs_are_read_again(finished: Path, gloo: GlooWorld, tmp_path: Path) -> None:
    """Claim: the samples of every step are on disk with their pictures, and train a discriminator for one epoch."""
    path = finished.parent / "pairs" / "pairs.jsonl"
    lines = read_pairs(path)
    rows = read_metrics(finished / "metrics.jsonl")
    assert sum(len(line.rejected) for line in lines) == sum(row["written_pairs"] for row in rows)
    assert sum(row["written_pairs"] for row in rows) >= 0.9 * sum(row["valid_rollouts"] for row in rows)
    assert not list(path.parent.glob(".*")), "the parts are joined and gone"

    asked = replace(
        config(tmp_path / "run"), data=MINI_WARM_START_PAIRS.data, pairs=PairsConfig(pairs=path), steps=None
    )
    assert gloo.run(warm_up, asked, num_ranks=1) == [""]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert 1 <= len(rows) <= len(lines) // PROMPTS
    for row in rows:
        assert row["perception/pairs"] == row["reasoning/pairs"] == row["rollouts"] > 0
        assert row["perception/auc"] is None and row["perception/auc_pairs"] == 0, "nobody knows what is right"
        assert row["discriminator_grad_norm"] > 0


def test_a_killed_run_goes_on_to_the_same_losses_and_pairs(finished: Path, tmp_path: Path) -> None:
    """SIGKILL after the first checkpoint; the same command with --load ends as the uninterrupted run, byte for byte."""
    output, pairs = tmp_path / "run", tmp_path / "pairs" / "pairs.jsonl"
    command = [sys.executable, str(TOOL), *FLAGS, "--output", str(output), "--write-pairs", str(pairs)]
    kill_when(command, (output / "checkpoints" / "step_000002").exists)
    assert not pairs.exists()
    result = subprocess.run([*command, "--load", str(output)], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same_steps(output, finished, relative=1e-6)
    assert pairs.read_bytes() == (finished.parent / "pairs" / "pairs.jsonl").read_bytes()
    weights = [(folder / "hf" / "model.safetensors").read_bytes() for folder in (output, finished)]
    assert weights[0] == weights[1]
