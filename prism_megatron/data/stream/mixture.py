"""Which samples an epoch shows, and in which order: a pure function of the seed and the epoch's number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from prism_megatron.data.index.samples import Samples
from prism_megatron.data.scenes import keyed_generator
from prism_megatron.errors import DataError

Order = npt.NDArray[np.int64]
"""Numbers of samples, in the order in which they come."""


class Mixture:
    """Draws epochs from the sources of some samples, each as often as it is to be seen.

    Every source is an endless row of passes over its samples, each pass in an order of its own, and an epoch takes the
    next part of it: with ``repeats`` 0.5 two epochs together show every sample once, with 2 each shows every one twice.
    """

    def __init__(self, samples: Samples, repeats: Mapping[str, float], *, seed: int) -> None:
        """``repeats``: how often an epoch shows each sample of a source; 1 for those not named.

        Raises DataError for a source that no sample has, a number that is negative or not finite, and an epoch of
        nothing.
        """
        for name, times in repeats.items():
            if name not in samples.sources:
                raise DataError(f"no sample has the source {name!r}; there are {', '.join(samples.sources)}")
            if not (math.isfinite(times) and times >= 0.0):
                raise DataError(f"source {name!r} cannot be seen {times} times in an epoch")
        self._seed = seed
        order = np.argsort(samples.source, kind="stable").astype(np.int64)
        bounds = np.searchsorted(samples.source[order], np.arange(len(samples.sources) + 1))
        self._sources = [
            (name, order[bounds[number] : bounds[number + 1]], Fraction(repeats.get(name, 1.0)))
            for number, name in enumerate(samples.sources)
        ]
        if not any(len(members) and times for _, members, times in self._sources):
            raise DataError("an epoch shows no sample: every source is seen 0 times")

    @property
    def identity(self) -> list[list[str]]:
        """What else than the seed and the samples decides the order; JSON can hold it."""
        return [[name, str(times)] for name, _, times in self._sources]

    def epoch(self, epoch: int) -> Order:
        """The samples of epoch 0, 1, …, in order."""
        shown = [self._taken(name, members, times, epoch) for name, members, times in self._sources]
        together = np.concatenate(shown)
        return together[keyed_generator("order", self._seed, epoch).permutation(len(together))]

    def _taken(self, name: str, members: Order, times: Fraction, epoch: int) -> Order:
        """The source's share of an epoch: its endless row from one multiple of ``times`` passes to the next."""
        start, stop = (math.floor(times * number * len(members)) for number in (epoch, epoch + 1))
        if start == stop:
            return members[:0]
        passes = range(start // len(members), (stop - 1) // len(members) + 1)
        row = [
            members[keyed_generator("pass", self._seed, name, number).permutation(len(members))] for number in passes
        ]
        first = passes[0] * len(members)
        return np.concatenate(row)[start - first : stop - first]
