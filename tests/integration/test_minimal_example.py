"""The example in one file plays the alignment that the stage plays.

Blind spot: the stage's controls, replay, probe set and rollouts ahead, which the example leaves out.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3VLForConditionalGeneration

from examples.minimal.align import align
from prism_megatron.config.check import CheckConfig
from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.engine.speed import SpeedConfig
from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.jobs.check_weights import check_weights
from prism_megatron.observability.metrics import read_metrics
from prism_megatron.stages.align.build import align_on
from prism_megatron.testing import GlooWorld

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "minimal" / "align.py"
STEPS = 2


@dataclass(frozen=True)
class Played:
    """The example's figures and what it exported, beside a run of the stage by the mini's recipe."""

    rows: Sequence[Mapping[str, Any]]
    export: Path
    run: Path


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Both at TP1."""
    example, run = (tmp_path_factory.mktemp("minimal") / name for name in ("example", "run"))
    config = replace(
        MINI_ALIGN, steps=STEPS, checkpoint=CheckpointConfig(output=run, save_every=STEPS),
        speed=SpeedConfig(fuse_weight_gradients="off"),  # as the example: it would round sums elsewhere
    )  # fmt: skip
    with GlooWorld(1) as gloo:
        (rows,) = gloo.run(partial(align, steps=STEPS, output=example))
        gloo.run(align_on, config)
    return Played(rows, example / "hf", run)


def test_the_example_is_the_stage(played: Played) -> None:
    """Claim: equal to the last bit are all figures of the example's steps and the policy's weights after them."""
    expected = read_metrics(played.run / "metrics.jsonl")
    assert len(played.rows) == len(expected) == STEPS
    for row, wanted in zip(played.rows, expected, strict=True):
        assert row == {name: wanted[name] for name in row}
        assert row["policy_updated"] == row["discriminator_updated"] == 1
        assert row["perception/pairs"] > 0
    assert check_weights(CheckConfig(str(played.export), str(played.run / "hf"))).equal


def test_the_export_loads_cleanly(played: Played) -> None:
    """Claim: transformers finds every tensor it wants and none that it does not."""
    _, info = Qwen3VLForConditionalGeneration.from_pretrained(played.export, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_command_prints_the_same_in_another_layout(played: Played, tmp_path: Path) -> None:
    """Claim: one command starts the four ranks of TP2·PP2, which print the figures of TP1 once, to the digits shown."""
    flags = ("--steps", "1", "--tp", "2", "--pp", "2", "--output", str(tmp_path))
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), *flags], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    starting, line = result.stdout.splitlines()
    assert starting.startswith("4 processes")
    assert line.startswith("step 1/1: ")
    figures = dict(re.findall(r"([\w/]+) ([-+.\de]+)(?:, |$)", line))
    assert {"perception/reward_gap", "reasoning/accuracy", "valid_share", "policy_grad_norm"} < set(figures)
    for name, value in figures.items():
        assert float(value) == pytest.approx(played.rows[0][name], rel=6e-3), name
    assert (tmp_path / "hf" / "config.json").is_file()
