"""Held-out prompts answered by the policy as it is: how many right, how many in the asked form, how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prism_megatron.data.loader import Example
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.bootstrap import Interval, mean_interval
from prism_megatron.evaluation.health import Figures
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.run.stage import Plain
from prism_megatron.sampling.shares import RewardGroup, sample_rewarded

MEAN = "sampled/accuracy"
"""The figure that says which policy is the best."""
Values = Mapping[str, Sequence[float]]
"""By measure, one value of each prompt."""


@dataclass(eq=False)
class Exam:
    """The same prompts every time, with the same draws; ``before`` is how the first policy answered.

    Example: ``exam.begin()``, training, then ``exam.moved()["greedy/accuracy"]["change"]``.
    """

    examples: Sequence[Example]
    rollout: RolloutEngine
    sampling: Sampling
    """of the samples; the greedy answer differs in its temperature alone"""
    reward: RewardGroup
    num_samples: int
    seed: int
    world: World
    before: Values | None = field(default=None, init=False)
    latest: Values | None = field(default=None, init=False)

    def begin(self) -> None:
        """Ask the first policy; a run that goes on has its answers already."""
        if self.before is None:
            self.before = self.ask()

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

    def row(self, values: Values) -> Figures:
        """The means, as entries of a step's row."""
        means = {f"eval/{name}": sum(of_prompts) / len(of_prompts) for name, of_prompts in values.items()}
        return {"eval/prompts": len(self.examples), **means}

    def moved(self) -> Plain:
        """Of each measure ``before``, ``after`` and the paired ``change``, with 95 % intervals over prompts."""
        assert self.before is not None, "the first policy is asked before any other"
        after = self.ask() if self.latest is None else self.latest
        return {
            name: {
                "before": _interval(self.before[name]),
                "after": _interval(values),
                "change": _interval([new - old for new, old in zip(values, self.before[name], strict=True)]),
            }
            for name, values in after.items()
        }


def best_of(best: float | None, held_out: Figures) -> tuple[float | None, bool]:
    """The highest held-out accuracy with that of a step's row, and whether that is it."""
    accuracy = held_out.get(f"eval/{MEAN}")
    if not isinstance(accuracy, float) or (best is not None and accuracy <= best):
        return best, False
    return accuracy, True


def _interval(values: Sequence[float]) -> Interval:
    return mean_interval(values, seed=0)


def lines_of(moved: Plain) -> list[str]:
    """The means and intervals of :meth:`Exam.moved` as a table of text."""
    lines = [f"{'held-out prompts':<20} {'before':>25} {'after':>8}   change"]
    for name, found in moved.items():
        form = ".1f" if name.endswith("/tokens") else ".3f"
        (start, low, high), (end, *_), (change, least, most) = found["before"], found["after"], found["change"]
        before = f"{start:{form}} [{low:{form}}, {high:{form}}]"
        lines.append(f"{name:<20} {before:>25} {end:>8{form}}   {change:+{form}} [{least:+{form}}, {most:+{form}}]")
    return lines
