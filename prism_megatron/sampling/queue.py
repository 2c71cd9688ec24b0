"""Rollouts for one step after the other, drawn for the next steps while this one trains.

With ``ahead`` 0 a step's rollouts are drawn when they are taken, from the policy that trains on them. With ``ahead`` k
threads draw those of up to k further steps meanwhile; unfinished answers go on under the weights of every update, so an
answer's oldest token is of a policy at most k updates old. Prompts are those of the synchronous run, step by step.
Nothing of the queue is in a checkpoint: a run that goes on draws what was under way again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from prism_megatron.data.loader import Example
from prism_megatron.engine.runtime import World
from prism_megatron.rewards.rewarder import Rewarded
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.sampling.shares import (
    Draw,
    RewardGroup,
    Samplers,
    find_samplers,
    gather_groups,
    sample_groups,
    share_to_draw,
)
from prism_megatron.types import RolloutGroup


@dataclass(frozen=True)
class Staleness:
    """How far a step's rollouts are behind the policy that trains on them."""

    mean_updates: float
    """mean over rollouts of the updates since the policy that drew their oldest token"""
    max_updates: int
    """the largest of these"""
    off_policy_share: float
    """share of tokens drawn with another version than the one that trains"""


@dataclass(frozen=True)
class SampledStep:
    """One step's prompts and rollouts. ``version`` is that of the policy that trains on them."""

    examples: Sequence[Example]
    groups: Sequence[RolloutGroup]
    version: int
    staleness: Staleness
    rewards: Sequence[Sequence[Rewarded]] = ()
    """of each answer by group, where the queue has them rewarded"""


class _Begun(NamedTuple):
    examples: Sequence[Example]
    draw: Draw


class RolloutQueue:
    """``take(step)`` gives the rollouts of each of ``steps`` in turn; all ranks take together."""

    def __init__(
        self,
        rollout: RolloutEngine,
        prompts: Callable[[int], Sequence[Example]],
        sampling: Sampling,
        *,
        n: int,
        seed: int,
        world: World,
        steps: range,
        ahead: int,
        reward: RewardGroup | None = None,
    ) -> None:
        """``prompts(step)`` gives the same examples on every rank; each gets ``n`` rollouts, and ``reward`` sees them.

        With ``ahead`` above 0 the engine's ``generate`` is called from threads, beside ``update_weights``.
        """
        self._rollout = rollout
        self._prompts = prompts
        self._sampling = sampling
        self._n = n
        self._seed = seed
        self._world = world
        self._to_begin = deque(steps)
        self._ahead = ahead
        self._reward = reward
        self._begun: dict[int, _Begun] = {}
        self._versions: deque[int] = deque(maxlen=ahead + 1)
        # Twice as many as draw at once: those of before ``begin_again`` may still be at it.
        self._threads = ThreadPoolExecutor(2 * (ahead + 1), thread_name_prefix="rollouts ahead")

    def take(self, step: int) -> SampledStep:
        """The rollouts of ``step``, after the queue has begun those of the steps ahead.

        Raises WeightSyncError as ``find_samplers``; what went wrong while these rollouts were drawn is raised now, on
        every rank (see ``gather_groups``).
        """
        while self._to_begin and self._to_begin[0] < step:  # a run that goes on has had these
            self._to_begin.popleft()
        samplers = find_samplers(self._rollout)
        if samplers.version not in self._versions:
            self._versions.append(samplers.version)
        while self._to_begin and self._to_begin[0] <= step + self._ahead:
            ahead = self._to_begin.popleft()
            self._begun[ahead] = self._begin(ahead, samplers)
        examples, draw = self._begun[step]
        groups, rewards = gather_groups(draw, examples, n=self._n)
        del self._begun[step]
        return SampledStep(examples, groups, samplers.version, staleness(groups, self._versions), rewards)

    def sample(self, examples: Sequence[Example], *, step: int) -> list[RolloutGroup]:
        """Rollouts of prompts that belong to no step, drawn now; ``step`` keys the draws. All ranks call it."""
        return sample_groups(
            self._rollout, examples, self._sampling, n=self._n, seed=self._seed, step=step, world=self._world
        )

    def begin_again(self) -> None:
        """Leave what is drawn ahead to nobody; the next ``take`` begins it again, by the policy of that moment.

        For a policy that was replaced: answers of one that collapsed would stand in the steps after. All ranks call it.
        """
        self._to_begin.extendleft(sorted(self._begun, reverse=True))
        self._begun.clear()

    def close(self) -> None:
        """End the threads, and with them an engine that still draws, as in a run that ends before its last step.

        Whoever owns the engine closes it again; servers, which alone draw ahead, do not mind.
        """
        if self._begun:
            self._rollout.close()
        self._threads.shutdown(cancel_futures=True)

    def _begin(self, step: int, samplers: Samplers) -> _Begun:
        examples = self._prompts(step)
        draw = share_to_draw(
            self._rollout,
            examples,
            self._sampling,
            samplers,
            n=self._n,
            seed=self._seed,
            step=step,
            world=self._world,
            reward=self._reward,
        )
        return _Begun(examples, self._threads.submit(draw).result if self._ahead else draw)


def staleness(groups: Sequence[RolloutGroup], versions: Sequence[int]) -> Staleness:
    """Of rollouts drawn by some of ``versions``: the policy's versions in order, the last one being what trains.

    AssertionError for a rollout that is older than all of them.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    updates = []
    for rollout in rollouts:
        assert rollout.policy_version in versions, f"a rollout of version {rollout.policy_version} is too old to train"
        updates.append(len(versions) - 1 - versions.index(rollout.policy_version))
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    fresh = sum(rollout.token_versions().count(versions[-1]) for rollout in rollouts)
    return Staleness(sum(updates) / len(updates), max(updates), 1.0 - fresh / tokens)
