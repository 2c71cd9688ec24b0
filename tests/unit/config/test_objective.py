"""Objectives and presets: their constants, flags over them, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import tyro

from prism_megatron.commands.align import parse
from prism_megatron.commands.rlvr import parse as parse_rlvr
from prism_megatron.config.cli import named_value, parse_over
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.stages.algorithms import ALGORITHMS, AlgorithmName, Overlong, algorithm
from prism_megatron.config.stages.objective import (
    CorrectionConfig,
    PolicyObjective,
    check_correction,
    check_objective,
    recommended_correction,
)
from prism_megatron.errors import ConfigError

STATED: dict[str, dict[str, Any]] = {
    "grpo": {"family": "clipped", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "sequence-mean", "kl": "k3",
             "kl_coefficient": 0.04, "mini_batches": 1},
    "dapo": {"family": "clipped", "clip_low": 0.2, "clip_high": 0.28, "aggregation": "token-mean", "kl": "none",
             "mini_batches": 16, "dual_clip": 0.0},
    "gspo": {"family": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence-mean", "mini_batches": 4},
    "gspo-token": {"family": "gspo-token", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence-mean"},
    "sapo": {"family": "sapo", "soft_positive": 1.0, "soft_negative": 1.05, "aggregation": "sequence-mean"},
    "dr-grpo": {"family": "clipped", "clip_low": 0.2, "clip_high": 0.2, "aggregation": "budget", "kl": "none"},
    "cispo": {"family": "cispo", "clip_low": 1.0, "aggregation": "token-mean", "kl": "none"},
    "gmpo": {"family": "gmpo", "clip_low": 0.4, "clip_high": 0.4, "aggregation": "sequence-mean"},
    "dppo": {"family": "dppo", "divergence_bound": 0.15, "ratio_cap": 20.0, "aggregation": "token-mean"},
    "prism-grpo": {"family": "clipped", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0, "kl": "none",
                   "aggregation": "token-mean", "mini_batches": 1},
    "prism-dapo": {"family": "clipped", "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0, "mini_batches": 1,
                   "aggregation": "token-mean"},
    "prism-gspo": {"family": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence-mean",
                   "mini_batches": 1},
}  # fmt: skip
"""As the papers and PRISM's scripts have them, written down a second time."""


@dataclass(frozen=True)
class Config:
    """What a stage that learns from rewards has of these."""

    algo: AlgorithmName = "grpo"
    objective: tyro.conf.OmitArgPrefixes[PolicyObjective] = field(default_factory=PolicyObjective)
    policy: OptimizerConfig = field(default_factory=OptimizerConfig)


def parsed(*argv: str) -> Config:
    preset = algorithm(named_value(argv, "algo") or "grpo")
    config = Config(objective=preset.objective, policy=preset.optimizer(OptimizerConfig()))
    return parse_over(config, argv, description="test")


def test_presets_have_their_papers_constants() -> None:
    assert set(STATED) == set(ALGORITHMS) == set(get_args(AlgorithmName))
    for name, constants in STATED.items():
        preset = algorithm(name)
        assert {key: getattr(preset.objective, key) for key in constants} == constants, name
        check_objective(preset.objective, like=preset.objective, top_p=1.0)
        assert preset.source
    assert {name for name, preset in ALGORITHMS.items() if preset.advantage != "group"} == {"dr-grpo"}
    assert ALGORITHMS["dr-grpo"].advantage == "group-mean"
    assert ALGORITHMS["dapo"].overlong == Overlong(longest=20480, buffer=4096, factor=1.0)
    assert ALGORITHMS["prism-dapo"].overlong == Overlong(longest=8192, buffer=4096, factor=1.0)


def test_rates_are_those_of_papers_and_scripts() -> None:
    base = OptimizerConfig(lr=3e-5, weight_decay=0.3, warmup_steps=7)
    made = {name: algorithm(name).optimizer(base) for name in ("sapo", "dapo", "prism-dapo", "prism-gspo")}
    assert made["sapo"] == base, "nothing stated"
    assert made["dapo"] == replace(base, lr=1e-6, warmup_steps=20)
    assert made["prism-dapo"] == replace(base, lr=1e-6, warmup_steps=10, weight_decay=0.1)
    assert made["prism-gspo"] == replace(base, lr=1e-6, warmup_ratio=0.05, weight_decay=0.1)


def test_a_flag_wins_over_the_preset() -> None:
    config = parsed("--algo", "dapo", "--clip-high", "0.3", "--mini-batches", "2", "--policy.lr", "2e-6")
    assert config.algo == "dapo"
    assert config.objective == replace(ALGORITHMS["dapo"].objective, clip_high=0.3, mini_batches=2)
    assert (config.policy.lr, config.policy.warmup_steps) == (2e-6, 20)
    config = parsed("--algo", "gspo", "--correction", "sequence-mask", "--correction-high", "4")
    assert config.objective.correction == CorrectionConfig("sequence-mask", correction_high=4.0)
    assert parsed().objective == ALGORITHMS["grpo"].objective


def test_the_algorithm_is_read_from_the_flag_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("algo: gspo\nobjective:\n  clip_high: 0.01\n")
    named = ("--config", str(tmp_path / "run.yaml"), "--steps", "3")
    assert parse_rlvr([*named, "--algo", "gmpo"]).objective.family == "gmpo"
    in_file = parse_rlvr(named)
    assert (in_file.algo, in_file.objective.clip_low, in_file.objective.clip_high) == ("gspo", 3e-4, 0.01)
    assert parse_rlvr([]).algo == "grpo"
    with pytest.raises(ConfigError, match=r"there is no --algo ppo; choose one of grpo, dapo"):
        algorithm("ppo")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"dual_clip": 1.1}, "--dual-clip 1.1 must be at least 1"),
        ({"soft_positive": 2.0}, "--soft-positive is for sapo, and the family is clipped"),
        ({"family": "sapo", "clip_low": 0.3}, "--clip-low is for cispo, clipped, gmpo, gspo, gspo-token"),
        ({"aggregation": "budget"}, "--token-budget and --aggregation budget need each other"),
        ({"token_budget": 5}, "--token-budget and --aggregation budget need each other"),
        ({"kl_coefficient": 0.0}, "--kl and --kl-coefficient need each other"),
        ({"kl": "none"}, "--kl and --kl-coefficient need each other"),
        ({"family": "policy-gradient", "epochs": 2}, "--mini-batches 1 times --epochs 2 are 2 updates"),
        ({"correction": CorrectionConfig(correction_high=2.0)}, "--correction-high needs --correction"),
    ],
)
def test_constants_that_do_not_go_together_are_refused(changes: dict[str, Any], complaint: str) -> None:
    preset = ALGORITHMS["grpo"].objective
    with pytest.raises(ConfigError, match=complaint):
        check_objective(replace(preset, **changes), like=preset, top_p=1.0)


@pytest.mark.parametrize(
    ("config", "top_p", "complaint"),
    [
        (CorrectionConfig(correction_veto=1e-4), 1.0, "--correction-veto needs --correction"),
        (CorrectionConfig("token-truncate", correction_low=0.5), 1.0, "--correction-low is for a mask"),
        (CorrectionConfig("token-mask", 3.0, 2.0), 1.0, "--correction-low 3 is above --correction-high 2"),
        (CorrectionConfig("token-mask", correction_high=0.5), 1.0, "--correction-low 2 is above"),
        (CorrectionConfig("token-truncate"), 0.9, "--top-p 0.9 samples from a part of it; use --top-p 1"),
    ],
)
def test_a_correction_that_cannot_be_one_is_refused(config: CorrectionConfig, top_p: float, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_correction(config, top_p=top_p)


def test_bounds_of_a_correction_by_its_kind() -> None:
    kinds = {kind: CorrectionConfig(kind) for kind in ("token-truncate", "sequence-mask", "geometric-mask")}
    assert {kind: (one.level, one.masks, one.high) for kind, one in kinds.items()} == {
        "token-truncate": ("token", False, 2.0),
        "sequence-mask": ("sequence", True, 2.0),
        "geometric-mask": ("geometric", True, 1.001),
    }
    assert kinds["sequence-mask"].low == 0.5
    assert CorrectionConfig("token-mask", correction_low=0.1).low == 0.1
    for one in kinds.values():
        check_correction(one, top_p=1.0)
    check_correction(CorrectionConfig(), top_p=0.5)


def test_old_log_probs_are_needed_for_more_than_one_update_or_a_correction() -> None:
    assert not PolicyObjective(family="clipped").needs_old_logprobs
    assert PolicyObjective(family="clipped", mini_batches=2).needs_old_logprobs
    assert PolicyObjective(family="clipped", epochs=2).needs_old_logprobs
    assert PolicyObjective(correction=CorrectionConfig("token-truncate")).needs_old_logprobs
    ratios = {family: PolicyObjective(family=family).ratio for family in ("policy-gradient", "clipped", "gspo", "gmpo")}
    assert ratios == {"policy-gradient": "none", "clipped": "token", "gspo": "sequence", "gmpo": "sequence"}


def test_a_correction_is_recommended_where_others_draw() -> None:
    """Nothing is said of the embedded engine, or where one is on already."""
    off, served = CorrectionConfig(), RolloutConfig(rollout="sglang")
    assert recommended_correction(off, RolloutConfig()) is None
    assert recommended_correction(CorrectionConfig("token-mask"), served) is None
    assert "come from servers and nothing corrects" in str(recommended_correction(off, served))
    line = recommended_correction(off, replace(served, rollout_ahead=2, top_p=0.9))
    assert "up to 2 updates old (--rollout-ahead 2)" in str(line)
    assert "--correction token-truncate with --top-p 1" in str(line)


def test_alignment_has_the_flags_of_a_correction_and_is_off_without() -> None:
    assert parse([]).correction == CorrectionConfig()
    config = parse(["--correction", "token-mask", "--correction-low", "0.25", "--correction-veto", "1e-4"])
    assert config.correction == CorrectionConfig("token-mask", correction_low=0.25, correction_veto=1e-4)
    with pytest.raises(ConfigError, match=r"--top-p 0\.5 samples from a part"):
        parse(["--correction", "token-mask", "--top-p", "0.5"])
    with pytest.raises(ConfigError, match=r"--correction-veto 2 must be above 0 and below 1"):
        parse(["--correction", "token-mask", "--correction-veto", "2"])
