"""Where a warm-start's preference pairs come from: samples of a policy that stays as it is, or a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from prism_megatron.data.loader import Example, RecordSource, SceneSource
from prism_megatron.data.pairs import PairSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.scene_set import SceneSet
from prism_megatron.engine.runtime import World
from prism_megatron.game.figures import Rights, rights_of
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.sampling.queue import RolloutQueue
from prism_megatron.sampling.shares import sample_groups
from prism_megatron.types import PreferenceGroup

Source = PairSource | RecordSource | SceneSource | SceneSet


@dataclass(frozen=True)
class StepPairs:
    """One step's pairs: a group's reference against each of its valid answers.

    ``examples`` are those that the groups were sampled for, one each; there are none for pairs read from a file.
    """

    examples: Sequence[Example]
    groups: Sequence[PreferenceGroup]

    def rights(self, renderer: Renderer) -> Rights:
        """Which answers are known to be right."""
        return rights_of(self.examples, self.groups, renderer) if self.examples else [None] * len(self.groups)


@dataclass(frozen=True, eq=False)
class Sources:
    """What is trained on, for how many steps, and what is held out (None where a set is too small for that)."""

    renderer: Renderer
    train: Source
    held_out: Source | None
    steps: int

    @property
    def train_text(self) -> str:
        """What is trained on, in words."""
        if isinstance(self.train, SceneSource):
            return "scenes"
        if isinstance(self.train, SceneSet):
            return f"{len(self.train.scenes)} selected scenes"
        kept = self.train.counts.kept
        return f"{kept} lines of pairs" if isinstance(self.train, PairSource) else f"{kept} records"


class Pairs(Protocol):
    """Gives the same pairs on every rank; all ranks call it together."""

    def prepare(self) -> None:
        """Before the first step."""

    def take(self, step: int) -> StepPairs:
        """Those of a step."""

    def held_out(self, count: int) -> StepPairs | None:
        """Those of ``count`` prompts that no step has, or of as many as there are; None where there are none."""

    def close(self) -> None:
        """Release what samples; may be called again."""


@dataclass(frozen=True, eq=False)
class FilePairs:
    """Lines of a ``--pairs`` file."""

    train: PairSource
    apart: PairSource | None

    def prepare(self) -> None:
        """Nothing: the lines are checked."""

    def take(self, step: int) -> StepPairs:
        return StepPairs((), self.train.batch(step))

    def held_out(self, count: int) -> StepPairs | None:
        if self.apart is None:
            return None
        return StepPairs((), [self.apart.group(i) for i in range(min(count, self.apart.counts.kept))])

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, eq=False)
class SampledPairs:
    """References beside fresh samples. Colocated servers hold memory only while they sample: a discriminator trains."""

    rollout: RolloutEngine
    queue: RolloutQueue
    apart: RecordSource | SceneSource | SceneSet | None
    sampling: Sampling
    hand_over: Callable[[], None]
    """gives the rollout engine the policy's weights, which stay: version 0"""
    rollouts_apart: int
    """samples of each held-out prompt"""
    seed: int
    """of the held-out samples' draws"""
    world: World

    def prepare(self) -> None:
        self.hand_over()

    def take(self, step: int) -> StepPairs:
        self.rollout.wake()
        sampled = self.queue.take(step)
        self.rollout.sleep()
        return StepPairs(sampled.examples, sampled.groups)

    def held_out(self, count: int) -> StepPairs | None:
        if self.apart is None:
            return None
        if isinstance(self.apart, RecordSource):
            count = min(count, self.apart.counts.kept)
        examples = [self.apart.example(i) for i in range(count)]
        self.rollout.wake()
        groups = sample_groups(self.rollout, examples, self.sampling, n=self.rollouts_apart, seed=self.seed, step=0,
                               world=self.world)  # fmt: skip
        self.rollout.sleep()
        return StepPairs(examples, groups)

    def close(self) -> None:
        self.queue.close()
        self.rollout.close()
