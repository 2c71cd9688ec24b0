"""How sure a mean, or another statistic, over scenes is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_NUM_RESAMPLES = 4000
_RESAMPLES_AT_ONCE = 250
_NUM_STATISTIC_RESAMPLES = 1000


class Interval(NamedTuple):
    """A mean (or other statistic) and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float] | npt.NDArray[np.float64], *, seed: int) -> Interval:
    """Percentile bootstrap of the mean of ``values`` (one per scene), scenes resampled with replacement.

    Efron and Tibshirani 1993, section 13.3. For a change, pass the paired differences. Raises ValueError without
    values or with one that is not finite: a scene without data must be left out by the caller, knowingly.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"an interval needs at least one value in one dimension, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("an interval needs finite values")
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            array[generator.integers(0, array.size, size=(_RESAMPLES_AT_ONCE, array.size))].mean(axis=1)
            for _ in range(_NUM_RESAMPLES // _RESAMPLES_AT_ONCE)
        ]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(array.mean()), float(low), float(high))


def statistic_interval(
    values_by_scene: Sequence[Sequence[float]], statistic: Callable[[npt.NDArray[np.float64]], float], *, seed: int
) -> Interval:
    """A statistic of all values with its percentile bootstrap; whole scenes are resampled, with all their values.

    A scene may have no value. Raises ValueError where none has.
    """
    scenes = [np.asarray(values, dtype=np.float64) for values in values_by_scene if len(values)]
    if not scenes:
        raise ValueError("an interval needs at least one value")
    generator = np.random.default_rng(seed)
    draws = [
        statistic(np.concatenate([scenes[i] for i in generator.integers(0, len(scenes), size=len(scenes))]))
        for _ in range(_NUM_STATISTIC_RESAMPLES)
    ]
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(float(statistic(np.concatenate(scenes))), float(low), float(high))
