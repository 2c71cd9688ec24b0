"""Samples held-out scenes with the rollout engine and judges them against the known truth."""

from __future__ import annotations

from collections.abc import Sequence

from prism_megatron.data.loader import Example, SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.scenes import SceneJudgement, judge
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.stages.sampling import sample_groups


def heldout_scenes(renderer: Renderer, *, count: int, seed: int) -> Sequence[Example]:
    """The first ``count`` scenes of the held-out split, whose questions and contents no training split has."""
    return SceneSource(renderer, split="heldout", seed=seed, batch_size=count).batch(0)


def judge_scenes(
    rollout: RolloutEngine,
    examples: Sequence[Example],
    renderer: Renderer,
    sampling: Sampling,
    *,
    seed: int,
    world: World,
) -> list[SceneJudgement]:
    """One response per scene, judged; the same list on every rank. Draws are keyed by ``seed``, not by the policy."""
    groups = sample_groups(rollout, examples, sampling, n=1, seed=seed, step=0, world=world)
    return [
        judge(example.scene, renderer.decode(group.rollouts[0].token_ids))
        for example, group in zip(examples, groups, strict=True)
        if example.scene is not None
    ]
