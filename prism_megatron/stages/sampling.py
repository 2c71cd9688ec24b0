"""Rollouts of one step: every rank that can draws a share of the samples, then all ranks hold all groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_megatron.data.loader import Example
from prism_megatron.engine.runtime import World
from prism_megatron.errors import WeightSyncError
from prism_megatron.parallel.collectives import all_gather_objects
from prism_megatron.parallel.layout import share_of
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.types import Rollout, RolloutGroup


@dataclass(frozen=True)
class SampleShare:
    """What one rank draws: of the prompts from number ``first`` on, the samples of each by number."""

    first: int
    samples: Sequence[range]


def sample_share(num_prompts: int, n: int, *, index: int, count: int) -> SampleShare:
    """The contiguous share ``index`` of ``count`` of all (prompt, sample) pairs; shares differ by one pair at most.

    A rank may start and end inside a prompt, whose prefill it then shares with its neighbours; with fewer prompts than
    ranks no rank is left without work as long as there are pairs.
    """
    pairs = share_of(range(num_prompts * n), index=index, count=count)
    if not pairs:
        return SampleShare(0, ())
    start, stop = pairs[0], pairs[-1] + 1
    prompts = range(start // n, (stop - 1) // n + 1)
    return SampleShare(prompts.start, tuple(range(max(0, start - p * n), min(n, stop - p * n)) for p in prompts))


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
    """``n`` answers to each example's prompt. Sampling is keyed by prompt and sample in the step, not by the rank.

    All ranks call it together; those whose engine holds weights sample. Raises WeightSyncError, on every rank, where
    none does or where they hold different versions.
    """
    samplers = _ranks_with_weights(rollout)
    drawn: Sequence[tuple[Rollout, ...]] = ()
    if world.rank in samplers:
        share = sample_share(len(examples), n, index=samplers.index(world.rank), count=len(samplers))
        if share.samples:
            prompts = [example.prompt for example in examples[share.first : share.first + len(share.samples)]]
            drawn = rollout.generate(
                prompts, n, sampling, seed=seed, step=step, prompt_offset=share.first, samples=share.samples
            )
    everyone = [answer for share in all_gather_objects(list(drawn)) for answers in share for answer in answers]
    return [
        RolloutGroup(prompt=example.prompt, reference=example.reference, rollouts=tuple(everyone[p * n : (p + 1) * n]))
        for p, example in enumerate(examples)
    ]


def _ranks_with_weights(rollout: RolloutEngine) -> list[int]:
    versions = all_gather_objects(rollout.policy_version)
    held = {version for version in versions if version is not None}
    if len(held) != 1:
        raise WeightSyncError(
            f"the ranks' rollout engines hold versions {sorted(held)} of the policy, and must all hold one; call "
            "update_weights on every rank first"
        )
    return [rank for rank, version in enumerate(versions) if version is not None]
