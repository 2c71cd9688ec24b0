"""Rollouts for one step after the other: batches of prompts are answered until enough groups have something to teach.

Batches have numbers, and a checkpoint keeps that of the next one: a run that goes on asks the same prompts, none twice.
Every rank holds all groups of a batch, so that all of them decide alike and ask alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from prism_megatron.data.loader import Example
from prism_megatron.rewards.rewarder import Rewarded
from prism_megatron.sampling.queue import RolloutQueue, SampledStep
from prism_megatron.types import RolloutGroup


@dataclass(frozen=True)
class RewardedGroup:
    """Answers to one prompt, and what each is worth."""

    example: Example
    group: RolloutGroup
    rewards: Sequence[Rewarded]

    @property
    def right(self) -> int:
        """Answers that are right, in the form that they have to have where that is asked for."""
        return sum(one.reward.answer > 0 for one in self.rewards)

    @property
    def informative(self) -> bool:
        """Whether answers differ in what they are worth, their form and length aside."""
        return len({one.reward.answer for one in self.rewards}) > 1


@dataclass(frozen=True)
class Found:
    """What one step learns from, and what it took to find it."""

    groups: Sequence[RewardedGroup]
    """to learn from"""
    asked: Sequence[RewardedGroup]
    """all that were answered"""
    batches: Sequence[SampledStep]
    surplus: int
    """groups that would have done, and for which there was no place"""

    @property
    def version(self) -> int:
        """That of the policy that trains on them."""
        return self.batches[-1].version

    def counts(self) -> Counter[str]:
        """Of all groups that were asked: none right, all right, and both."""
        kinds = ("mixed" if one.informative else "all_right" if one.right else "none_right" for one in self.asked)
        return Counter(kinds)


@dataclass(eq=False)
class Prospector:
    """Takes batches from a queue. ``cursor`` is the number of the next one."""

    queue: RolloutQueue
    wanted: int
    """groups that a step learns from"""
    max_batches: int
    """that one step asks"""
    selective: bool
    """whether groups without right and wrong answers are left out"""
    cursor: int = 0

    def find(self) -> Found:
        """Groups for one step, at most ``wanted``; all ranks call it together.

        Fewer, or none, where ``max_batches`` have no more. Raises as ``RolloutQueue.take``.
        """
        batches: list[SampledStep] = []
        asked: list[RewardedGroup] = []
        kept: list[RewardedGroup] = []
        while not batches or (len(kept) < self.wanted and len(batches) < self.max_batches):
            batch = self.queue.take(self.cursor)
            self.cursor += 1
            batches.append(batch)
            new = [RewardedGroup(*one) for one in zip(batch.examples, batch.groups, batch.rewards, strict=True)]
            asked += new
            kept += [one for one in new if one.informative or not self.selective]
        count = min(len(kept), self.wanted)
        return Found(kept[:count], asked, batches, surplus=len(kept) - count)
