"""Claim: what is played for a run has the run's own layout and settings, and the longest rows that it may meet."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from prism_megatron.config.architecture.model import ALL_VISION, ModelConfig
from prism_megatron.config.engine.forecast import ForecastConfig, check_forecast
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.config.presets import preset
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.rlvr import RLVRConfig
from prism_megatron.config.stages.sft import SFTConfig
from prism_megatron.errors import ConfigError
from prism_megatron.forecast.build import plan_align, plan_rlvr, plan_sft

SHAPE = preset("4B")
PARALLEL, FULL = ParallelConfig(tp=2, pp=2), RecomputeConfig("full")


def test_an_alignment_is_played_on_its_longest_prompts_and_answers() -> None:
    """Claim: both roles fill prompt and answer to the token, and a pipeline of two has two micro-batches a rank."""
    config = replace(AlignConfig(), parallel=PARALLEL, recompute=FULL, model=ModelConfig(freeze_policy_vision=True))
    plan = plan_align(config, SHAPE, None, world_size=8)
    assert list(plan.roles) == ["policy", "discriminator"]
    assert plan.ranks() == (0, 7)
    for case in plan.roles.values():
        work = case.work
        assert (case.parallel, case.recompute, case.world_size) == (PARALLEL, FULL, 8)
        assert work.image_grid is not None
        image = math.prod(work.image_grid) // SHAPE.vision.merge**2
        assert work.text_tokens + image == config.data.max_prompt_tokens
        assert work.answer_tokens == config.data.max_response_tokens
        # 2 rows fit 16384 tokens, 2 micro-batches a pipeline, 2 data-parallel replicas.
        assert work.prompts * work.rollouts == 8
    assert plan.policy.freeze == ALL_VISION
    assert plan.roles["discriminator"].freeze == ()
    assert plan.samples_here


def test_no_image_is_larger_than_asked_for() -> None:
    """Claim: --max-pixels bounds the image, and the text takes what is left."""
    config = AlignConfig()
    config = replace(config, data=replace(config.data, max_pixels=320 * 320))
    work = plan_align(config, SHAPE, None, world_size=1).policy.work
    assert work.image_grid == (1, 20, 20)
    assert work.text_tokens == config.data.max_prompt_tokens - 100


def test_a_judge_of_text_is_shown_no_image() -> None:
    config = AlignConfig()
    config = replace(config, discriminator=replace(config.discriminator, modality="text"))
    judge = plan_align(config, SHAPE, None, world_size=1).roles["discriminator"]
    assert judge.work.image_grid is None
    assert judge.freeze == ALL_VISION


def test_a_reference_is_held_where_a_divergence_is_asked_for() -> None:
    config = RLVRConfig()
    assert not plan_rlvr(config, SHAPE, world_size=1).has_reference
    config = replace(config, objective=replace(config.objective, kl="k3", kl_coefficient=0.1))
    assert plan_rlvr(config, SHAPE, world_size=1).has_reference


def test_fine_tuning_is_played_on_whole_packed_rows() -> None:
    """Claim: a micro-batch is one row of --max-tokens, and what is frozen stays so."""
    config = SFTConfig()
    case = plan_sft(config, SHAPE, world_size=1).policy
    assert case.work.image_grid is not None
    image = math.prod(case.work.image_grid) // SHAPE.vision.merge**2
    assert case.work.text_tokens + image + case.work.answer_tokens == config.data.max_tokens
    assert case.work.tokens_per_microbatch == config.data.max_tokens
    assert case.freeze == config.freeze


@pytest.mark.parametrize(
    ("settings", "flag"),
    [(ForecastConfig(device_gib=3), "--device-reserve-gib 4"), (ForecastConfig("off", 80), "--forecast off")],
)
def test_settings_that_contradict_one_another_are_refused(settings: ForecastConfig, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        check_forecast(settings, RecomputeConfig())
