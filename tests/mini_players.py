"""The mini world's roles and plans as tests need them on ranks."""

from __future__ import annotations

from pathlib import Path

import torch

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.game.discriminator import DiscriminatorOrigin
from prism_megatron.game.judge import JudgePlan
from prism_megatron.training.batches import BatchFormat
from prism_megatron.training.policy_update import UpdatePlan
from prism_megatron.training.roles import build_policy

FOLDER = MINI_FOLDER / "policy"
VOCAB_SIZE = Qwen3VLShape.from_folder(FOLDER).text.vocab


def mini_policy(world: World, *, steps: int = 10) -> MegatronEngine:
    """The shipped policy in fp32."""
    shape = Qwen3VLShape.from_folder(FOLDER)
    return build_policy(FOLDER, shape, world=world, dtype=torch.float32, optimizer=MINI_ALIGN.policy, total_steps=steps)


def mini_discriminator(
    world: World, config: AlignConfig = MINI_ALIGN, *, folder: Path = FOLDER, dtype: torch.dtype = torch.float32
) -> MegatronEngine:
    """The discriminator that ``config`` asks for, beside the mini's policy."""
    return DiscriminatorOrigin.of(
        config.discriminator, of_the_mini=config.model.model is None, mini=config.model.mini
    ).build(
        folder,
        Qwen3VLShape.from_folder(folder),
        world=world,
        dtype=dtype,
        optimizer=config.discriminator_optimizer,
        total_steps=config.steps * config.game.discriminator_updates_per_step,
        seed=config.seed,
    )


def judge_plan(form: BatchFormat, *, tokens: int, seed: int, balance: float = 0.0) -> JudgePlan:
    """That of the mini's recipe, one update a step."""
    return JudgePlan(form, tokens, score_regulariser=GameConfig().score_regulariser, seed=seed, load_balance=balance)


def update_plan(form: BatchFormat, *, tokens: int, temperature: float = 1.0) -> UpdatePlan:
    """An on-policy step's."""
    return UpdatePlan(PolicyObjective(), form, tokens, temperature)
