"""Rollouts of one step: every rank that can draws a share of the samples, then all ranks hold all groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from prism_megatron.data.loader import Example
from prism_megatron.engine.runtime import World
from prism_megatron.errors import PrismError, RolloutError, WeightSyncError
from prism_megatron.parallel.collectives import all_gather_objects
from prism_megatron.parallel.layout import share_of
from prism_megatron.rewards.rewarder import Rewarded
from prism_megatron.rollout.base import RolloutEngine, SampleRequest, Sampling
from prism_megatron.types import Rollout, RolloutGroup

RewardGroup = Callable[[Example, Sequence[Rollout]], Future[list[Rewarded]]]
"""Begins to reward answers to an example, and does not wait."""


class Drawn(NamedTuple):
    """One rank's share of a step's samples, by prompt."""

    answers: Sequence[tuple[Rollout, ...]]
    rewards: Sequence[Sequence[Rewarded]]
    """of each answer; none of any where nobody rewards them"""


Draw = Callable[[], Drawn]
"""Draws one rank's share. It takes part in no collective, so any thread may call it."""


class Gathered(NamedTuple):
    """All answers of a step and what they are worth, on every rank."""

    groups: list[RolloutGroup]
    rewards: list[list[Rewarded]]
    """of each answer by group; no group's where nobody rewards them"""


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
    return gather_groups(draw, examples, n=n).groups


def sample_rewarded(
    rollout: RolloutEngine,
    examples: Sequence[Example],
    sampling: Sampling,
    reward: RewardGroup,
    *,
    n: int,
    seed: int,
    step: int,
    world: World,
) -> Gathered:
    """:func:`sample_groups` with the answers' rewards. Raises RewardError too, on every rank."""
    samplers = find_samplers(rollout)
    draw = share_to_draw(rollout, examples, sampling, samplers, n=n, seed=seed, step=step, world=world, reward=reward)
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
    reward: RewardGroup | None = None,
) -> Draw:
    """This rank's part of ``n`` answers to each example's prompt, ready to be drawn.

    Whoever draws an answer has it rewarded, and the answers of a prompt are while others are still being sampled.
    """
    share = SampleShare(0, ())
    if world.rank in samplers.ranks:
        share = sample_share(len(examples), n, index=samplers.ranks.index(world.rank), count=len(samplers.ranks))
    if not share.samples:
        return lambda: Drawn((), ())
    asked = examples[share.first : share.first + len(share.samples)]
    request = SampleRequest(
        [example.prompt for example in asked],
        n,
        sampling,
        seed=seed,
        step=step,
        prompt_offset=share.first,
        samples=share.samples,
    )
    return partial(_draw, rollout, request, asked, reward)


def _draw(
    rollout: RolloutEngine, request: SampleRequest, asked: Sequence[Example], reward: RewardGroup | None
) -> Drawn:
    if reward is None:
        return Drawn(rollout.generate(request), ())
    under_way: dict[int, Future[list[Rewarded]]] = {}

    def begin(place: int, rollouts: Sequence[Rollout]) -> None:
        under_way[place] = reward(asked[place], rollouts)

    answers = rollout.generate(replace(request, finished=begin))
    return Drawn(answers, [under_way[place].result() for place in range(len(asked))])


def gather_groups(draw: Draw, examples: Sequence[Example], *, n: int) -> Gathered:
    """All ranks' answers and rewards together, on every rank; all ranks call it together.

    Where drawing fails on a rank, that rank raises its PrismError and all others a RolloutError with the same message.
    """
    drawn = Drawn((), ())
    problem: PrismError | None = None
    try:
        drawn = draw()
    except PrismError as error:
        problem = error
    shares = all_gather_objects((drawn, None if problem is None else str(problem)))
    if problem is not None:
        raise problem
    for _, message in shares:
        if message is not None:
            raise RolloutError(message)
    everyone = [answer for share, _ in shares for some in share.answers for answer in some]
    rewards = [reward for share, _ in shares for some in share.rewards for reward in some]
    groups = [
        RolloutGroup(prompt=example.prompt, reference=example.reference, rollouts=tuple(everyone[p * n : (p + 1) * n]))
        for p, example in enumerate(examples)
    ]
    return Gathered(groups, [rewards[start : start + n] for start in range(0, len(rewards), n)])
