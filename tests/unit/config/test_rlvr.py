"""The configuration of verifiable rewards: what an algorithm sets, and what is refused before any process starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.commands.rlvr import parse
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.experiments.mini_rlvr import mini_rlvr
from prism_megatron.config.presets import preset
from prism_megatron.config.stages.rlvr import RLVRConfig, check_rlvr, check_rlvr_values
from prism_megatron.errors import ConfigError


def test_an_algorithm_sets_what_it_states() -> None:
    """Claim: PRISM's script for DAPO; what no paper states stays as it is."""
    config = RLVRConfig().of("prism-dapo")
    assert (config.steps, config.rollout.prompts_per_step, config.rollout.rollouts_per_prompt) == (1500, 32, 16)
    assert (config.objective.clip_low, config.objective.clip_high, config.objective.dual_clip) == (0.2, 0.28, 10.0)
    assert (config.overlong_buffer, config.overlong_factor, config.dynamic.dynamic_sampling) == (4096, 1.0, True)
    assert (config.policy.lr, config.policy.warmup_steps, config.policy.weight_decay) == (1e-6, 10, 0.1)
    dr = RLVRConfig().of("dr-grpo")
    assert (dr.advantage, dr.objective.token_budget, dr.overlong_buffer, dr.dynamic.dynamic_sampling) == (
        "group-mean", 8192, 0, False)  # fmt: skip
    check_rlvr_values(config)
    check_rlvr_values(dr)


def test_flags_lie_over_the_algorithm() -> None:
    config = parse(["--algo", "dapo", "--clip-high", "0.5", "--no-dynamic-sampling", "--overlong-buffer", "0"])
    assert (config.objective.clip_low, config.objective.clip_high) == (0.2, 0.5)
    assert not config.dynamic.dynamic_sampling and config.overlong_buffer == 0


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "sapo", "dr-grpo", "cispo", "gmpo", "dppo", "prism-gspo"])
def test_every_algorithm_suits_the_mini(name: str, tmp_path: Path) -> None:
    """Claim: with scenes and with records, in the layout of ``make rlvr``."""
    for records in (False, True):
        config = replace(mini_rlvr(name, records=records), parallel=ParallelConfig(tp=2, pp=2))
        config = replace(config, data=replace(config.data, data=tmp_path if records else None))
        check_rlvr(config, preset("4B"), world_size=4)


def test_a_batch_is_divided_among_any_number_of_ranks(tmp_path: Path) -> None:
    """Claim: each mini-batch needs an answer, and nothing else; records of ``--format-sft`` are the same on each."""
    config = mini_rlvr("gspo", records=False)
    few = replace(config, rollout=replace(config.rollout, prompts_per_step=3, rollouts_per_prompt=2))
    check_rlvr(few, preset("4B"), world_size=8)
    fewer = replace(few, rollout=replace(few.rollout, prompts_per_step=1))
    with pytest.raises(ConfigError, match="1 prompts of --prompts-per-step times 2 rollouts cannot be 4 --mini-batch"):
        check_rlvr(fewer, preset("4B"), world_size=2)
    taught = replace(few, data=replace(few.data, data=tmp_path, format_sft=1))
    with pytest.raises(ConfigError, match="must be a multiple of the 2 data-parallel ranks; use 2 or 4"):
        check_rlvr(taught, preset("4B"), world_size=2)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"overlong_buffer": 9000}, "--overlong-buffer 9000 is more than the 8192 of --max-response-tokens"),
        ({"prompts_per_batch": 8}, "--prompts-per-batch is for --dynamic-sampling"),
        ({"max_batches": 3}, "--max-batches is for --dynamic-sampling"),
        ({"dynamic_sampling": True, "rollouts_per_prompt": 1}, "--rollouts-per-prompt 1 makes groups of one"),
        ({"rollouts_per_prompt": 1}, "--advantage group compares answers to one prompt"),
        ({"format_sft": 5}, "--format-sft trains on records"),
        ({"prompts": Path("some.jsonl")}, "--prompts some.jsonl is no file"),
        ({"prompts": Path("some.jsonl"), "data": Path()}, "--prompts some.jsonl is no file"),
    ],
)
def test_what_nothing_would_use_is_refused(changes: dict[str, Any], complaint: str) -> None:
    config = RLVRConfig().of("prism-grpo")
    for section in ("dynamic", "rollout", "data"):
        own = {name: value for name, value in changes.items() if hasattr(getattr(config, section), name)}
        config = replace(config, **{section: replace(getattr(config, section), **own)})
    whole = {name: value for name, value in changes.items() if hasattr(config, name) and name != "data"}
    config = replace(config, **whole)
    with pytest.raises(ConfigError, match=complaint):
        check_rlvr_values(config)
