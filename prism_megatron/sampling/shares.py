"""Rollouts of one step: every rank that can draws a share of the samples, then all ranks hold all groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from prism_megatron.data.loader import Example
from prism_megatron.engine.runtime import World
from prism_megatron.errors import PrismError, RolloutError, WeightSyncError
from prism_megatron.parallel.collectives import all_gather_objects
from prism_megatron.parallel.layout import share_of
from prism_megatron.rollout.base import RolloutEngine, SampleRequest, Sampling
from prism_megatron.types import Rollout, RolloutGroup

Draw = Callable[[], Sequence[tuple[Rollout, ...]]]
"""Draws one rank's share of a step's samples, by prompt. It takes part in no collective, so any thread may call it."""


@dataclass(frozen=True)
class SampleShare:
    """What one rank draws: of the prompts from number ``first`` on, the samples of each by number."""

    first: int
    samples: Sequence[range]


@dataclass(frozen=True)
class Samplers:
    """The ranks whose rollout engine holds weights, and the one version of the policy that all of them hold."""

    ranks: Sequence[int]
    version: int


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
    none does or where they hold different versions, and as ``gather_groups``.
    """
    samplers = find_samplers(rollout)
    draw = share_to_draw(rollout, examples, sampling, samplers, n=n, seed=seed, step=step, world=world)
    return gather_groups(draw, examples, n=n)


def find_samplers(rollout: RolloutEngine) -> Samplers:
    """Who samples, and from which policy; all ranks call it together.

    Raises WeightSyncError, on every rank, where no rank holds weights or where they hold different versions.
    """
    versions = all_gather_objects(rollout.policy_version)
    held = {version for version in versions if version is not None}
    if len(held) != 1:
        raise WeightSyncError(
            f"the ranks' rollout engines hold versions {sorted(held)} of the policy, and must all hold one; call "
            "update_weights on every rank first"
        )
    return Samplers([rank for rank, version in enumerate(versions) if version is not None], held.pop())


def share_to_draw(
    rollout: RolloutEngine,
    examples: Sequence[Example],
    sampling: Sampling,
    samplers: Samplers,
    *,
    n: int,
    seed: int,
    step: int,
    world: World,
) -> Draw:
    """This rank's part of ``n`` answers to each example's prompt, ready to be drawn."""
    share = SampleShare(0, ())
    if world.rank in samplers.ranks:
        share = sample_share(len(examples), n, index=samplers.ranks.index(world.rank), count=len(samplers.ranks))
    if not share.samples:
        return lambda: ()
    prompts = [example.prompt for example in examples[share.first : share.first + len(share.samples)]]
    request = SampleRequest(
        prompts, n, sampling, seed=seed, step=step, prompt_offset=share.first, samples=share.samples
    )
    return partial(rollout.generate, request)


def gather_groups(draw: Draw, examples: Sequence[Example], *, n: int) -> list[RolloutGroup]:
    """All ranks' answers together, on every rank; all ranks call it together.

    Where drawing fails on a rank, that rank raises its PrismError and all others a RolloutError with the same message.
    """
    drawn: Sequence[tuple[Rollout, ...]] = ()
    problem: PrismError | None = None
    try:
        drawn = draw()
    except PrismError as error:
        problem = error
    shares = all_gather_objects((list(drawn), None if problem is None else str(problem)))
    if problem is not None:
        raise problem
    for _, message in shares:
        if message is not None:
            raise RolloutError(message)
    everyone = [answer for answers, _ in shares for some in answers for answer in some]
    return [
        RolloutGroup(prompt=example.prompt, reference=example.reference, rollouts=tuple(everyone[p * n : (p + 1) * n]))
        for p, example in enumerate(examples)
    ]
