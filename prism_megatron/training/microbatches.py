"""Which sequences lie together in a micro-batch: a pure function of their lengths, so every rank makes the same plan.

A micro-batch is filled up to a budget of token slots (a sequence's length, rounded up to what the layout divides).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

Bin = TypeVar("Bin")


@dataclass(frozen=True)
class GroupPart:
    """Rollouts of one group and the copy of its reference that they are judged beside.

    Exactly one part of a group is not ``repeated``: what counts a reference once counts that one's.
    Example: a group of 16 in two micro-batches is ``GroupPart(0, (0, …, 8))`` and
    ``GroupPart(0, (9, …, 15), repeated=True)``.
    """

    group: int
    rollouts: tuple[int, ...]
    repeated: bool = False


MicroBatch = tuple[GroupPart, ...]


def plan_pairs(
    references: Sequence[int], rollouts: Sequence[Mapping[int, int]], *, budget: int, rounds_of: int, ranks: int = 1
) -> tuple[MicroBatch, ...]:
    """Parts of each micro-batch: every rollout once, beside its group's reference, and every group at least once.

    ``references[g]`` and ``rollouts[g][r]`` are the slots of a reference and of its rollouts. No micro-batch is above
    ``budget`` but a reference with one rollout, or alone, that is so by itself: a run must not end because one answer
    is long. Their number is a multiple of ``rounds_of``, itself one of ``ranks``; where there are too few pairs for
    that, references alone fill the rest. Of two ways to fill micro-batches of several data-parallel ranks
    (``_by_groups``, ``_evenly``) the one is taken whose busiest rank has least to do. They come by ranks
    (``of_rank``), and on each in the order of their groups, so that neighbours show the same images.
    """
    costs = _Costs(references, rollouts)
    ways = WAYS if ranks > 1 else (_by_groups,)
    plans = [costs.balanced(fill(costs, budget, rounds_of), ranks) for fill in ways]
    loads = [costs.of_ranks(plan, ranks) for plan in plans]
    best = min(range(len(plans)), key=lambda number: (max(loads[number]), sum(loads[number]), number))

    seen: set[int] = set()
    plan = []
    for parts in plans[best]:
        plan.append(tuple(replace(part, repeated=part.group in seen) for part in parts))
        seen |= {part.group for part in parts}
    return tuple(plan)


@dataclass(frozen=True)
class _Costs:
    """Slots of references and of their rollouts."""

    references: Sequence[int]
    rollouts: Sequence[Mapping[int, int]]

    def of(self, parts: Sequence[GroupPart]) -> int:
        return sum(self.references[s.group] + sum(self.rollouts[s.group][r] for r in s.rollouts) for s in parts)

    def of_ranks(self, plan: Sequence[MicroBatch], ranks: int) -> list[int]:
        return [sum(map(self.of, of_rank(plan, dp_rank=rank, dp_size=ranks))) for rank in range(ranks)]

    def balanced(self, bins: Sequence[MicroBatch], ranks: int) -> list[MicroBatch]:
        """The bins, as many for each rank: the costliest first, each to the rank that has least so far."""
        size = len(bins) // ranks
        shares: list[list[MicroBatch]] = [[] for _ in range(ranks)]
        loads = [0] * ranks
        ordered = [tuple(sorted(parts, key=_order)) for parts in bins]
        for parts in sorted(ordered, key=lambda parts: (-self.of(parts), _order(parts[0]))):
            free = [rank for rank in range(ranks) if len(shares[rank]) < size]
            rank = min(free, key=loads.__getitem__)
            shares[rank].append(parts)
            loads[rank] += self.of(parts)
        return [parts for share in shares for parts in sorted(share, key=lambda parts: _order(parts[0]))]


def _by_groups(costs: _Costs, budget: int, rounds_of: int) -> list[MicroBatch]:
    """A part has as many rollouts as the budget holds beside the reference; parts of several groups fill bins up.

    References are repeated as seldom as can be. The costliest bins are halved until there are whole rounds.
    """
    parts: list[GroupPart] = []
    for group, own in enumerate(costs.rollouts):
        numbers = list(own)
        fitting = _first_fit([own[r] for r in numbers], budget - costs.references[group]) or [[]]
        parts += [GroupPart(group, tuple(numbers[i] for i in sorted(places))) for places in fitting]
    bins = [tuple(parts[i] for i in places) for places in _first_fit([costs.of([part]) for part in parts], budget)]
    return _filled(_split_to_rounds(bins, rounds_of, costs.of), rounds_of)


def _evenly(costs: _Costs, budget: int, rounds_of: int) -> list[MicroBatch]:
    """Rollouts spread over as few whole rounds as hold them, the costliest first, each where least lies so far.

    That repeats more references, and leaves no rank with a long row more than another (longest processing time first,
    Graham 1969).
    """
    items: list[tuple[int, int | None]] = [
        (group, r) for group, own in enumerate(costs.rollouts) for r in (own or (None,))
    ]

    def alone(item: tuple[int, int | None]) -> int:
        group, r = item
        return 0 if r is None else costs.rollouts[group][r]

    items.sort(key=lambda item: (-costs.references[item[0]] - alone(item), item[0], -1 if item[1] is None else item[1]))
    count = max(1, -(-sum(map(alone, items)) // (budget * rounds_of))) * rounds_of
    while True:
        bins: list[dict[int, list[int]]] = [{} for _ in range(count)]
        loads = [0] * count
        for group, r in items:
            added = [load + alone((group, r)) + costs.references[group] * (group not in bins[i])
                     for i, load in enumerate(loads)]  # fmt: skip
            place = min(range(count), key=added.__getitem__)
            bins[place].setdefault(group, []).extend(() if r is None else (r,))
            loads[place] = added[place]
        if max(loads) <= budget or count >= len(items):
            return _filled([_bin(parts) for parts in bins if parts], rounds_of)
        count += rounds_of


WAYS = (_by_groups, _evenly)


def _bin(rollouts: Mapping[int, Sequence[int]]) -> MicroBatch:
    return tuple(GroupPart(group, tuple(sorted(own))) for group, own in rollouts.items())


def _filled(bins: list[MicroBatch], rounds_of: int) -> list[MicroBatch]:
    return bins + [(GroupPart(0, ()),)] * (-len(bins) % rounds_of)


def of_rank(plan: Sequence[Bin], *, dp_rank: int, dp_size: int) -> Sequence[Bin]:
    """A data-parallel rank's micro-batches: as many as every other's, neighbours of one another."""
    assert len(plan) % dp_size == 0, "plans are made for whole rounds"
    count = len(plan) // dp_size
    return plan[dp_rank * count : (dp_rank + 1) * count]


def _order(part: GroupPart) -> tuple[int, tuple[int, ...]]:
    return part.group, part.rollouts


def _halves(parts: MicroBatch) -> tuple[MicroBatch, MicroBatch] | None:
    """A micro-batch in two: by parts, and where there is only one, by its rollouts, at the price of a reference."""
    if len(parts) > 1:
        return parts[::2], parts[1::2]
    (part,) = parts
    if len(part.rollouts) < 2:
        return None
    return (GroupPart(part.group, part.rollouts[::2]),), (GroupPart(part.group, part.rollouts[1::2]),)


def _first_fit(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Items of each bin, the costliest first, each in the first bin with room (first-fit decreasing, Johnson 1974)."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        index = next((i for i, left in enumerate(room) if costs[item] <= left), len(bins))
        if index == len(bins):
            bins.append([])
            room.append(budget)
        bins[index].append(item)
        room[index] -= costs[item]
    return bins


def _split_to_rounds(bins: Sequence[MicroBatch], rounds_of: int, cost: Callable[[MicroBatch], int]) -> list[MicroBatch]:
    """Halve the costliest bin that can be, until their number is a multiple or none can be."""
    bins = list(bins)
    while len(bins) % rounds_of:
        for index in sorted(range(len(bins)), key=lambda i: (-cost(bins[i]), i)):
            parts = _halves(bins[index])
            if parts is not None:
                bins[index : index + 1] = parts
                break
        else:
            break
    return bins
