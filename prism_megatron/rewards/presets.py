"""From what is known of a rollout to its reward: named components, and how they add up.

The components are kept apart, for advantages that normalise each of them (GDPO).
"""

from __future__ import annotations

from dataclasses import dataclass

from prism_megatron.config.stages.rewards import RewardPreset

FORMAT = "format"
"""The component that says whether a response has the form that it has to have."""


@dataclass(frozen=True)
class Preset:
    """Weights of the two components."""

    answer: float
    format: float
    answer_needs_format: bool
    """a right answer in a response of another form is worth nothing"""


PRESETS: dict[RewardPreset, Preset] = {
    "prism": Preset(answer=0.8, format=0.2, answer_needs_format=True),
    "sum": Preset(answer=1.0, format=1.0, answer_needs_format=False),
}
"""``prism`` is PRISM's released code (rewards 0, 0.2 and 1), ``sum`` its paper (r_acc + r_fmt)."""


@dataclass(frozen=True)
class Reward:
    """What one rollout is worth.

    Example: ``Reward({"accuracy": 1.0, "format": 1.0}, {"accuracy": 0.8, "format": 0.2}).total`` is 1.
    """

    components: dict[str, float]
    """each before its weight: accuracy, or reward for a user's function, and format"""
    weights: dict[str, float]

    @property
    def answer(self) -> float:
        """What the answer is worth by itself, in the form that it came in: more than 0 where it is right."""
        return next(value for name, value in self.components.items() if name != FORMAT)

    @property
    def total(self) -> float:
        return sum(self.weights[name] * value for name, value in self.components.items())


def combine(preset: Preset, *, name: str, answer: float, valid: bool) -> Reward:
    """The reward of one rollout; ``name`` is that of the answer's component."""
    if preset.answer_needs_format and not valid:
        answer = 0.0
    return Reward({name: answer, FORMAT: float(valid)}, {name: preset.answer, FORMAT: preset.format})
