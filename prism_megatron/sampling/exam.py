"""Held-out prompts answered by the policy as it is: how many right, how many in the asked form, how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prism_megatron.data.identity import Identity, identity_of
from prism_megatron.data.loader import Example
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.health import Figures
from prism_megatron.evaluation.held_out import SAMPLED, Moved, Values, means, moved
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.sampling.shares import RewardGroup, sample_rewarded


@dataclass(frozen=True)
class ExamTimes:
    """After which steps held-out prompts are asked. Example: ``ExamTimes(steps=40, every=10, save_every=20)``."""

    steps: int
    every: int
    """0 asks after the last step alone"""
    save_every: int
    """steps between checkpoints, which are asked too"""

    def asks_after(self, step: int, *, ends: bool = False) -> bool:
        """Whether they are asked after this step; always after the last, and after one that ends the run."""
        done = step + 1
        in_between = self.every > 0 and (done % self.every == 0 or done % self.save_every == 0)
        return ends or done == self.steps or in_between

    def saves_after(self, step: int, *, ends: bool = False) -> bool:
        """Whether there will be a checkpoint of this step."""
        return ends or step + 1 == self.steps or (step + 1) % self.save_every == 0


class Sitting(NamedTuple):
    """What held-out prompts said of the policy of one step."""

    row: Figures
    best: bool
    """whether there will be a checkpoint of the step, and none before it got more samples right"""


NOT_ASKED = Sitting({}, False)


@dataclass(eq=False)
class Exam:
    """The same prompts every time, with the same draws; ``before`` is how the first policy answered.

    Example: ``exam.begin()``, training with ``exam.sit(step)`` now and then, ``exam.moved()["greedy/accuracy"]``.
    """

    examples: Sequence[Example]
    rollout: RolloutEngine
    sampling: Sampling
    """of the samples; the greedy answer differs in its temperature alone"""
    reward: RewardGroup
    num_samples: int
    seed: int
    times: ExamTimes
    world: World
    before: Values | None = field(default=None, init=False)
    latest: Values | None = field(default=None, init=False)
    best: float | None = field(default=None, init=False)
    """the highest accuracy of samples that a checkpoint has"""

    def begin(self) -> None:
        """Ask the first policy; a run that goes on has its answers already."""
        if self.before is None:
            self.before = self.ask()

    def sit(self, step: int, *, ends: bool = False) -> Sitting:
        """Ask after a step; ``ends`` says that it ends the run. All ranks call it together. Raises as :meth:`ask`."""
        row = means(self.ask())
        accuracy = row[SAMPLED]
        assert accuracy is not None, "every prompt has samples"
        is_best = self.times.saves_after(step, ends=ends) and (self.best is None or accuracy > self.best)
        self.best = accuracy if is_best else self.best
        return Sitting(row, is_best)

    def moved(self) -> Moved:
        """How the policy's answers moved since the first; one that has not been asked since it was loaded is."""
        assert self.before is not None, "the first policy is asked before any other"
        return moved(self.before, self.ask() if self.latest is None else self.latest)

    def ask(self) -> Values:
        """Ask all prompts; all ranks call it together. Raises as ``sample_rewarded``.

        ``accuracy`` is the share of right answers to a prompt (mean@k of its samples), ``pass`` whether one of the
        samples is right (pass@k), ``format`` the share of valid responses, ``tokens`` their mean length.
        """
        sampled = self._asked("sampled", self.num_samples, self.sampling.temperature)
        self.latest = {**self._asked("greedy", 1, 0.0), **sampled}
        return self.latest

    def _asked(self, mode: str, count: int, temperature: float) -> dict[str, list[float]]:
        sampling = Sampling(temperature, 1.0 if temperature == 0 else self.sampling.top_p, self.sampling.max_new_tokens)
        groups, rewards = sample_rewarded(
            self.rollout, self.examples, sampling, self.reward, n=count, seed=self.seed, step=0, world=self.world
        )
        found = {
            "accuracy": [sum(one.reward.answer > 0 for one in of_group) / count for of_group in rewards],
            "format": [sum(one.read.valid for one in of_group) / count for of_group in rewards],
            "tokens": [sum(len(rollout.token_ids) for rollout in group.rollouts) / count for group in groups],
        }
        if count > 1:
            found["pass"] = [float(any(one.reward.answer > 0 for one in of_group)) for of_group in rewards]
        return {f"{mode}/{measure}": values for measure, values in found.items()}

    def to_plain(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"asked": self._identity, "before": self.before, "best": self.best}

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Take back what :meth:`to_plain` gave, unless it is of other prompts: the policy of now is then the first."""
        if plain.get("asked", self._identity) == self._identity:
            self.before, self.best = plain.get("before"), plain.get("best")

    @property
    def _identity(self) -> Identity:
        """Which prompts, in which order, and how often each."""
        parts = [(f"{one.prompt.id}\n{one.prompt.question}", one.reference.token_ids) for one in self.examples]
        return identity_of("data", parts, batch_size=self.num_samples)
