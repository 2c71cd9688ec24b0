"""Held-out prompts of an alignment: off unless asked for, and flags about them that nothing would use are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism_megatron.commands.align import parse
from prism_megatron.config.experiments.mini import mini_align
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.rlvr import RLVRConfig
from prism_megatron.errors import ConfigError


def test_nobody_is_asked_unless_that_is_asked_for(tmp_path: Path) -> None:
    """Claim: by no recipe either; the other values are those of verifiable rewards."""
    for config in (AlignConfig(), mini_align("habits", records=False), mini_align("drift", records=True)):
        assert config.exam.eval_prompts == 0
    path = tmp_path / "own.yaml"
    path.write_text("exam: {eval_prompts: 128, eval_every: 5}\nrewards: {reward_preset: sum}\n")
    config, of_rlvr = parse(["--config", str(path)]), RLVRConfig().exam
    assert (config.exam.eval_prompts, config.exam.eval_every, config.rewards.reward_preset) == (128, 5, "sum")
    assert (config.exam.eval_prompts, config.exam.eval_rollouts) == (of_rlvr.eval_prompts, of_rlvr.eval_rollouts)
    assert parse(["--eval-prompts", "3"]).exam.eval_every == of_rlvr.eval_every


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--eval-every 5", "--eval-every is about answers to held-out prompts, and none are asked; say how many"),
        ("--eval-prompts 0 --eval-rollouts 2", "--eval-rollouts is about answers"),
        ("--reward some.module:function", "--reward is about answers"),
        ("--check-seconds 2", "--check-seconds is about answers"),
        ("--eval-prompts -1", "--eval-prompts -1 must be at least 0"),
        ("--eval-prompts 3 --eval-rollouts 0", "--eval-rollouts 0 must be at least 1"),
    ],
)
def test_flags_that_nothing_would_use_are_refused(flags: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse(flags.split())
