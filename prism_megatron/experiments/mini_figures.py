"""What a mini world's checkpoints do on held-out scenes: how a policy answers, and how a discriminator scores it."""

from __future__ import annotations

from pathlib import Path

import torch

from model_providers.moe_discriminator.folder import read_variant
from prism_megatron.config.architecture.model import MiniWorld
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.stages.discriminator import DiscriminatorConfig
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.conversion.hf.open_source import open_weights
from prism_megatron.data.render import Renderer
from prism_megatron.engine.host.execution import PLAIN
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.health import Figures, correlation
from prism_megatron.game.discriminator import DiscriminatorOrigin
from prism_megatron.game.figures import game_row, judged_groups, rights_of
from prism_megatron.game.judge import JudgePlan, score
from prism_megatron.rollout.base import Sampling
from prism_megatron.rollout.embedded import EmbeddedRollout
from prism_megatron.sampling.replicas import build_replica
from prism_megatron.sampling.scene_answers import answer_in_all_modes, heldout_scenes, tabulate
from prism_megatron.sampling.shares import sample_groups
from prism_megatron.types import TOWER_NAMES, TOWERS

MAX_RESPONSE_TOKENS = 96
_ROWS_PER_BATCH = 512
"""A third faster than a run's own for a model so small, with a thousand scenes to ask."""
TOKENS_PER_MICROBATCH = 4096
OVER_ALL = "score_length_correlation"


def answers_of(folder: Path, mini: MiniWorld, *, count: int, seed: int, world: World) -> dict[str, dict[str, float]]:
    """Means of how the policy in ``folder`` answers ``count`` scenes, per mode and measure."""
    renderer = Renderer.from_folder(folder)
    responses = answer_in_all_modes(
        replica_of(folder, renderer, world),
        heldout_scenes(renderer, count=count, seed=seed, world=mini),
        renderer,
        max_new_tokens=MAX_RESPONSE_TOKENS,
        seed=seed,
        world=world,
    )
    return {
        mode: {measure: round(float(values.mean()), 4) for measure, values in rows.items()}
        for mode, rows in tabulate([responses]).items()
    }


def scores_of(
    folder: Path, policy: Path, mini: MiniWorld, *, prompts: int, rollouts: int, seed: int, world: World
) -> Figures:
    """Figures of the discriminator in ``folder`` on samples of ``policy`` for held-out scenes, as a game's row.

    Beside the row's correlations of score and length, which are those inside a group, a tower has the one over all
    rollouts: inside a group of ``drift`` all lengths may be equal.
    """
    renderer, shape = Renderer.from_folder(policy), Qwen3VLShape.from_folder(policy)
    kind = read_variant(folder)
    origin = DiscriminatorOrigin(DiscriminatorConfig(routing=kind.routing, modality=kind.modality), folder)
    discriminator = origin.build(
        policy, shape, world=world, dtype=torch.float32, optimizer=OptimizerConfig(), total_steps=1, seed=seed
    )
    examples = heldout_scenes(renderer, count=prompts, seed=seed, world=mini)
    sampling = Sampling(max_new_tokens=MAX_RESPONSE_TOKENS)
    replica = replica_of(policy, renderer, world)
    groups = sample_groups(replica, examples, sampling, n=rollouts, seed=seed, step=0, world=world)
    plan = JudgePlan(
        origin.batch_format(shape, renderer, world=world, execution=PLAIN),
        TOKENS_PER_MICROBATCH,
        score_regulariser=GameConfig().score_regulariser,
        seed=seed,
    )
    judgement = score(discriminator, groups, plan, world=world, step=0)
    rights = rights_of(examples, groups, renderer)
    row = game_row(groups, judgement, rights)
    for tower, name in zip(TOWERS, TOWER_NAMES, strict=True):
        judged = judged_groups(groups, judgement.scores, rights, tower)
        row[f"{name}/{OVER_ALL}"] = correlation(
            [value for group in judged for value in group.rollouts],
            [value for group in judged for value in group.lengths],
        )
    return row


def replica_of(folder: Path, renderer: Renderer, world: World) -> EmbeddedRollout:
    """A rollout engine with the policy's weights, on every rank."""
    weights = open_weights(folder)
    replica = build_replica(folder, renderer, world=world, dtype=torch.float32, rows_per_batch=_ROWS_PER_BATCH)
    replica.update_weights(((name, weights.get(name)) for name in weights.names()), version=0)
    return replica
