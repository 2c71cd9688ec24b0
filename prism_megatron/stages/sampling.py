"""Rollouts of one step: every rank samples a share of the prompts, then all ranks hold all groups."""

from __future__ import annotations

from collections.abc import Sequence

from prism_megatron.data.loader import Example
from prism_megatron.engine.runtime import World
from prism_megatron.parallel.collectives import all_gather_objects
from prism_megatron.parallel.layout import share_of
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.types import Rollout, RolloutGroup


def sample_groups(
    rollout: RolloutEngine,
    examples: Sequence[Example],
    sampling: Sampling,
    *,
    n: int,
    seed: int,
    step: int,
    world: World,
) -> list[RolloutGroup]:
    """``n`` answers to each example's prompt. Sampling is keyed by the prompt's place in the step, not by the rank."""
    mine = share_of(range(len(examples)), index=world.rank, count=world.world_size)
    sampled: Sequence[tuple[Rollout, ...]] = ()
    if mine:
        prompts = [examples[i].prompt for i in mine]
        sampled = rollout.generate(prompts, n, sampling, seed=seed, step=step, prompt_offset=mine[0])
    everyone = [answers for share in all_gather_objects(list(sampled)) for answers in share]
    return [
        RolloutGroup(prompt=example.prompt, reference=example.reference, rollouts=answers)
        for example, answers in zip(examples, everyone, strict=True)
    ]
