"""The mini worlds' recipes: rates and sizes that align a model of a few million parameters on two CPU cores."""

from __future__ import annotations

from dataclasses import replace

from prism_megatron.config.architecture.model import MiniWorld, ModelConfig
from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.data import DataConfig
from prism_megatron.config.stages.game import GameConfig

MINI_ALIGN = AlignConfig(
    data=DataConfig(system_prompt=None, max_response_tokens=96),
    rollout=RolloutConfig(prompts_per_step=8, rollouts_per_prompt=8),
    checkpoint=CheckpointConfig(save_every=20),
    # A policy rate of 3e-4 collapses into length; a discriminator rate ten times the policy's stays ahead of it.
    policy=OptimizerConfig(lr=5e-5),
    discriminator_optimizer=OptimizerConfig(lr=5e-4, beta2=0.95),
    steps=40,
    tokens_per_microbatch=2048,
)

MINI_ALIGN_RECORDS = replace(
    MINI_ALIGN,
    # The mini knows scenes only: it first learns to keep the format on the set's images and questions. Its text is
    # spelled out byte by byte, hence longer answers.
    data=DataConfig(system_prompt=None, max_response_tokens=320, format_sft=150, format_sft_lr=2e-3),
)


MINI_ALIGN_DRIFT = replace(
    MINI_ALIGN,
    model=ModelConfig(mini="drift"),
    # Caption and reasoning go wrong together here, and a tower's advantage says which of them did.
    game=GameConfig(credit="segment"),
    policy=OptimizerConfig(lr=1e-4),
)


def mini_align(mini: MiniWorld, *, records: bool) -> AlignConfig:
    """Scenes of a mini world, or ``records``."""
    if records:
        return replace(MINI_ALIGN_RECORDS, model=ModelConfig(mini=mini))
    return MINI_ALIGN if mini == "habits" else MINI_ALIGN_DRIFT
