"""What each rank runs for the layout table: one round of the game on the shipped mini, from the same rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.data.loader import SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.engine.runtime import World
from prism_megatron.game.credit import credit_groups, experience_of
from prism_megatron.game.judge import train
from prism_megatron.rollout.base import Sampling
from prism_megatron.sampling.replicas import build_replica
from prism_megatron.sampling.shares import sample_groups
from prism_megatron.training.policy_update import update_policy
from prism_megatron.training.roles import batch_format
from prism_megatron.types import RolloutGroup
from tests.mini_players import judge_plan, mini_discriminator, mini_policy, update_plan

NUM_PROMPTS, NUM_ROLLOUTS = 4, 3
SEED = 7


def sample(world: World) -> Sequence[RolloutGroup]:
    """Four groups of the mini; short answers are cut in one group, so valid counts differ between its halves."""
    folder = MINI_FOLDER / "policy"
    renderer = Renderer.from_folder(folder)
    rollout = build_replica(folder, renderer, world=world, dtype=torch.float32)
    weights = HFFolder(folder)
    rollout.update_weights(((name, weights.get(name)) for name in weights.names()), version=0)
    scenes = SceneSource(renderer, split="align", seed=SEED, batch_size=NUM_PROMPTS)
    groups = sample_groups(
        rollout, scenes.batch(0), Sampling(max_new_tokens=96), n=NUM_ROLLOUTS, seed=SEED, step=0, world=world
    )
    cut = sample_groups(
        rollout, scenes.batch(0), Sampling(max_new_tokens=20), n=NUM_ROLLOUTS, seed=SEED, step=0, world=world
    )
    # Groups 0 and 2 go to one data-parallel rank and 1 and 3 to the other: two of rank 0's answers are invalid.
    mixed = RolloutGroup(groups[0].prompt, groups[0].reference, (*cut[0].rollouts[:2], groups[0].rollouts[2]))
    return [mixed, *groups[1:]]


def one_round(
    world: World, groups: Sequence[RolloutGroup], tokens_per_microbatch: int, share_prompts: bool
) -> dict[str, Any]:
    """Losses, gradient norms and scores of one discriminator and one policy step."""
    renderer = Renderer.from_folder(MINI_FOLDER / "policy")
    policy, discriminator = mini_policy(world), mini_discriminator(world)
    form = batch_format(renderer, world, share_prompts=share_prompts)
    judging = judge_plan(form, tokens=tokens_per_microbatch, seed=SEED)
    judgement = train(discriminator, groups, judging, world=world, step=0)
    credited = credit_groups(groups, judgement, MINI_ALIGN.game, seed=SEED, step=0, version=0)
    experience = experience_of(groups, credited, MINI_ALIGN.game, version=0)
    learning = update_plan(form, tokens=tokens_per_microbatch)
    update = update_policy(policy, experience, learning, world=world)
    assert judgement.result is not None
    assert update.result is not None
    return {
        "policy loss": update.sums["policy_loss"],
        "discriminator loss": judgement.sums["discriminator_loss"],
        "policy grad norm": update.result.grad_norm,
        "discriminator grad norm": judgement.result.grad_norm,
        "scores": [judgement.scores[key] for key in sorted(judgement.scores, key=str)],
    }
