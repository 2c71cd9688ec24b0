"""How far two outcomes lie apart, and how far they may.

Shape suffixes: T tokens of a sample, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Outcome:
    """Logits ``[T, V]`` of each sample and the gradients of the probe loss, summed over samples, by name; float32."""

    logits: Sequence[Tensor]
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class Tolerance:
    """``logits`` absolute; ``gradients`` relative to the norm of a parameter's gradient."""

    logits: float
    gradients: float


FP32 = Tolerance(logits=2e-4, gradients=1e-3)
"""Far above what float32 rounding costs a tiny model (5e-6 and 3e-6, see ``make parity``). A published model of dozens
of layers has larger logits; how close rounding brings it to this limit has not been measured."""

REPLICA_TOLERANCE = 1e-5
"""How far copies of a replicated gradient may differ between ranks, relative to its norm; on the CPU they are equal."""

BF16_FACTOR = 2.0
"""In bf16 ours may err this much more against float32 than transformers does in bf16 on the same samples."""


@dataclass(frozen=True)
class Difference:
    """``gradients`` names every parameter with its relative error, the worst first.

    A parameter whose expected gradient is zero errs infinitely unless ours is zero too.
    """

    logits_max_abs: float
    token_agreement: float
    gradients: tuple[tuple[str, float], ...]

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter whose gradient errs most, and by how much."""
        return self.gradients[0]

    def within(self, tolerance: Tolerance) -> bool:
        """Whether nothing errs more than ``tolerance``; a NaN never does."""
        return self.logits_max_abs <= tolerance.logits and self.worst[1] <= tolerance.gradients


def difference(ours: Outcome, expected: Outcome) -> Difference:
    """Compare the same samples. ValueError when the two do not name the same parameters."""
    if strangers := sorted(ours.gradients.keys() ^ expected.gradients.keys()):
        raise ValueError(f"only one of the two models has a parameter {strangers[0]!r}")
    return Difference(
        logits_max_abs=largest_error(ours.logits, expected.logits),
        token_agreement=agreement(ours.logits, expected.logits),
        gradients=gradient_errors(ours.gradients, expected.gradients),
    )


def largest_error(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest absolute difference, or NaN where there is one."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(ours, expected, strict=True)]).max())


def agreement(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Share of tokens after which both would pick the same next one."""
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(ours, expected, strict=True)])
    return float(same.double().mean())


def gradient_errors(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[tuple[str, float], ...]:
    """Every parameter with ``|ours - expected| / |expected|``, the worst first, a NaN before all.

    ValueError for a gradient of another shape.
    """
    errors = []
    for name, theirs in expected.items():
        if ours[name].shape != theirs.shape:
            raise ValueError(f"{name!r} has a gradient {tuple(ours[name].shape)}, expected {tuple(theirs.shape)}")
        norm = float(theirs.norm())
        distance = float((ours[name] - theirs).norm())
        errors.append((name, distance / norm if norm else (0.0 if distance == 0.0 else float("inf"))))
    return worst_first(errors)


def worst_first(errors: Sequence[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """Sorted by error; a NaN is worse than anything."""
    return tuple(sorted(errors, key=lambda item: (not math.isnan(item[1]), -item[1])))


def bf16_tolerance(theirs: Sequence[Difference]) -> Tolerance:
    """From transformers' own largest differences between bf16 and float32.

    A model with experts differs most where rounding makes it choose another expert; the wider the samples, the likelier
    theirs hold such a choice, and a bug hidden below it shows in float32.
    Raises ValueError where those are not finite.
    """
    if not all(math.isfinite(one.worst[1]) for one in theirs):
        raise ValueError(f"transformers' own bf16 gradient of {theirs[0].worst[0]!r} cannot be measured by")
    return Tolerance(
        logits=BF16_FACTOR * max(one.logits_max_abs for one in theirs),
        gradients=BF16_FACTOR * max(one.worst[1] for one in theirs),
    )
