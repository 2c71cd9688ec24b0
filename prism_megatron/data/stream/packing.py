"""Which samples share a row, so that rows are full, and which rank gets which rows.

Best fit alone, longest first, leaves rows of few samples 4 to 7 % empty: it uses up what would have filled the gaps.
Here a row is closed by one, two or three samples that fill it exactly, where there are such; and lengths whose rows
were left with gaps come earlier in a second look.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FULL = 0.995
"""Share of all rows that is enough; short of it, another look is taken."""
_LOOKS = 5
_CANDIDATES = 16
"""How many samples are tried as the first of three."""
_IN_ORDER = 64
"""How far the given order is searched for one that fits, before the largest that fits is taken."""


def slots(lengths: npt.NDArray[np.int64], *, multiple: int) -> npt.NDArray[np.int64]:
    """Tokens that sequences take up in a row: their lengths, rounded up to a multiple."""
    return -(-lengths // multiple) * multiple


def best_fit(sizes: npt.NDArray[np.int64], *, budget: int) -> list[list[int]]:
    """Packs of positions in ``sizes``, each of at most ``budget`` in all; every position is in exactly one.

    Depends on the arguments alone; of sizes in another order it makes other packs. Sizes are from 1 to ``budget``. A
    look at 8,192 of them takes about 0.02 s.
    """
    assert not len(sizes) or (sizes.min() > 0 and sizes.max() <= budget), "every sample fits a pack"
    values = sizes.tolist()
    # What is larger than half shares its pack with smaller ones only, so it chooses first.
    urgency = {size: float(size * (2 * size > budget)) * budget for size in set(values)}
    least = -(-sum(values) // budget)
    best: list[list[int]] | None = None
    for _ in range(_LOOKS):
        packs, gaps = _one_look(values, budget, urgency)
        if best is None or len(packs) < len(best):
            best = packs
        if len(best) == least or sum(values) >= FULL * budget * len(best):
            break
        _learn(urgency, values, packs, gaps)
    assert best is not None
    return best


def _learn(urgency: dict[int, float], values: list[int], packs: list[list[int]], gaps: list[int]) -> None:
    """Make sizes more urgent by the mean gap of the packs that they were in; what was learned before counts half."""
    sums: dict[int, tuple[int, int]] = {}
    for pack, gap in zip(packs, gaps, strict=True):
        for position in pack:
            total, count = sums.get(values[position], (0, 0))
            sums[values[position]] = (total + gap, count + 1)
    for size, (total, count) in sums.items():
        urgency[size] = urgency[size] / 2 + total / count


def _one_look(values: list[int], budget: int, urgency: dict[int, float]) -> tuple[list[list[int]], list[int]]:
    """Packs, and how much of each is left empty: the most urgent size begins a pack, the given order goes on."""
    bag = Bag(values, budget)
    heads = sorted(bag.waiting, key=lambda size: (-urgency[size], size))
    packs: list[list[int]] = []
    gaps: list[int] = []
    for head in heads:
        while bag.waiting[head]:
            pack = [bag.take(head)]
            free = budget - head
            while chosen := _next(bag, free):
                pack.extend(bag.take(size) for size in chosen)
                free -= sum(chosen)
            packs.append(pack)
            gaps.append(free)
    return packs, gaps


def _next(bag: Bag, free: int) -> tuple[int, ...]:
    """Sizes that go into a pack with so much free: what fills it, or one more on the way there; none if none fits."""
    largest = bag.largest(free)
    if not largest or largest == free:
        return (largest,) if largest else ()
    top = bag.top
    if free <= 2 * top and (pair := bag.pair(free)):
        return pair
    if free < 3 * bag.smallest:
        sums = range(free - 1, largest, -1)
        return next((pair for total in sums if (pair := bag.pair(total))), (largest,))
    if free <= 3 * top:
        for first in bag.in_order(free - 1, _CANDIDATES):
            pair = bag.pair(free - first)
            if pair and len(bag.waiting[first]) > pair.count(first):
                return (first, *pair)
    return (next(iter(bag.in_order(free, 1)), largest),)


class Bag:
    """Sizes that are still to be packed. Which there are is the bits of one large integer, so that whole sets of them
    are compared at once."""

    def __init__(self, values: list[int], budget: int) -> None:
        self.budget = budget
        self.waiting: dict[int, list[int]] = {}
        """positions of each size, the first one last"""
        for position in range(len(values) - 1, -1, -1):
            self.waiting.setdefault(values[position], []).append(position)
        self._values = values
        self._taken = bytearray(len(values))
        self._first = 0  # of those in the given order that may not be taken yet
        self._present = sum(1 << size for size in self.waiting)  # bit n: size n
        self._mirrored = sum(1 << (budget - size) for size in self.waiting)  # bit budget - n: size n

    @property
    def smallest(self) -> int:
        """0 where nothing is left."""
        return (self._present & -self._present).bit_length() - 1 if self._present else 0

    @property
    def top(self) -> int:
        """The largest size; 0 where nothing is left."""
        return max(0, self._present.bit_length() - 1)

    def largest(self, most: int) -> int:
        """The largest size that is at most ``most``; 0 where there is none."""
        within = self._present if most >= self.budget else self._present & ((2 << most) - 1)
        return max(0, within.bit_length() - 1)

    def pair(self, total: int) -> tuple[int, int] | None:
        """Two sizes with this sum, of all such the closest, larger one first."""
        half = (total + 1) // 2
        common = (self._present & (self._mirrored >> (self.budget - total))) >> half
        while common:
            lowest = common & -common
            size = lowest.bit_length() - 1 + half
            if 2 * size != total or len(self.waiting[size]) > 1:
                return size, total - size
            common ^= lowest
        return None

    def in_order(self, most: int, count: int) -> list[int]:
        """Up to ``count`` sizes of at most ``most``, of the next ones in the given order."""
        while self._first < len(self._values) and self._taken[self._first]:
            self._first += 1
        found: list[int] = []
        for position in range(self._first, min(self._first + _IN_ORDER, len(self._values))):
            if not self._taken[position] and self._values[position] <= most:
                found.append(self._values[position])
                if len(found) == count:
                    break
        return found

    def take(self, size: int) -> int:
        """The first position that waits with this size."""
        waiting = self.waiting[size]
        position = waiting.pop()
        self._taken[position] = 1
        if not waiting:
            self._present ^= 1 << size
            self._mirrored ^= 1 << (self.budget - size)
        return position


def spread(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Positions in ``costs`` for each rank, as many for each as for the others or one fewer, with sums that are close.

    The dearest goes first, to the rank with the least so far that has room. Within a rank they come dearest first, so
    that what ranks do at the same time costs about the same.
    """
    room = -(-len(costs) // num_ranks)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    sums = [0.0] * num_ranks
    for position in sorted(range(len(costs)), key=lambda position: (-costs[position], position)):
        rank = min((rank for rank in range(num_ranks) if len(shares[rank]) < room), key=lambda rank: (sums[rank], rank))
        shares[rank].append(position)
        sums[rank] += costs[position]
    return shares
