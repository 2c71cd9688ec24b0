"""Means over seeds and scenes with intervals that are wide enough for both.

Shape suffixes: S seeds, C scenes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from prism_megatron.evaluation.bootstrap import Interval

_RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 500
Verdict = Literal["above", "below", "no difference shown"]


def crossed_interval(values_S_C: npt.NDArray[np.float64], *, seed: int = 0) -> Interval:
    """Mean of ``[seeds, scenes]`` with a 95 % percentile bootstrap; seeds and scenes are resampled independently.

    Every seed has the same scenes, hence the crossed design (Owen 2007, "The pigeonhole bootstrap", which is
    conservative: its variance is at least that of the mean). With one seed, scenes alone vary. Raises ValueError
    without values or with one that is not finite.
    """
    if values_S_C.ndim != 2 or not values_S_C.size or not np.isfinite(values_S_C).all():
        raise ValueError(f"finite values of seeds and scenes are needed, got shape {values_S_C.shape}")
    seeds, scenes = values_S_C.shape
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(_RESAMPLES // _RESAMPLES_AT_ONCE):
        of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=_RESAMPLES_AT_ONCE)
        of_scenes = generator.multinomial(scenes, np.full(scenes, 1 / scenes), size=_RESAMPLES_AT_ONCE)
        means.append(((of_seeds @ values_S_C) * of_scenes).sum(axis=1) / (seeds * scenes))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Interval(float(values_S_C.mean()), float(low), float(high))


def verdict(difference: Interval) -> Verdict:
    """Of a paired difference: whether its interval leaves zero out, and on which side."""
    if difference.low > 0:
        return "above"
    return "below" if difference.high < 0 else "no difference shown"
