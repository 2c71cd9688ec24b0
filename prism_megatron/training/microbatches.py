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


def plan_rows(costs: Sequence[int], *, budget: int, rounds_of: int) -> tuple[tuple[int, ...], ...]:
    """Rows of each micro-batch: every row once, none above ``budget`` but a row that is so by itself.

    Their number is a multiple of ``rounds_of``, and so must be that of the rows, or ValueError is raised: every row may
    need a micro-batch of its own.
    """
    if len(costs) % rounds_of:
        raise ValueError(f"{len(costs)} rows cannot fill whole rounds of {rounds_of} micro-batches")

    def cost(rows: Sequence[int]) -> int:
        return sum(costs[row] for row in rows)

    def halves(rows: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        return (rows[::2], rows[1::2]) if len(rows) > 1 else None

    bins = _split_to_rounds([tuple(rows) for rows in _first_fit(costs, budget)], rounds_of, cost, halves)
    return tuple(sorted(tuple(sorted(rows)) for rows in bins))


def plan_pairs(
    references: Sequence[int], rollouts: Sequence[Mapping[int, int]], *, budget: int, rounds_of: int
) -> tuple[MicroBatch, ...]:
    """Parts of each micro-batch: every rollout once, beside its group's reference, and every group at least once.

    ``references[g]`` and ``rollouts[g][r]`` are the slots of both segments of a reference and of its rollouts. A part
    has as many rollouts as the budget holds beside the reference, and parts of several groups fill a micro-batch up.
    No micro-batch is above ``budget`` but a reference with one rollout, or alone, that is so by itself: a run must not
    end because one answer is long. Their number is a multiple of ``rounds_of``; where there are too few pairs for that,
    references alone fill the rest. They come in the order of their groups, so that neighbours show the same images.
    """

    def cost(parts: Sequence[GroupPart]) -> int:
        return sum(references[s.group] + sum(rollouts[s.group][r] for r in s.rollouts) for s in parts)

    parts: list[GroupPart] = []
    for group, costs in enumerate(rollouts):
        numbers = list(costs)
        fitting = _first_fit([costs[r] for r in numbers], budget - references[group]) or [[]]
        parts += [GroupPart(group, tuple(numbers[i] for i in sorted(places))) for places in fitting]
    bins = [tuple(parts[i] for i in places) for places in _first_fit([cost([part]) for part in parts], budget)]
    bins = _split_to_rounds(bins, rounds_of, cost, _halves)
    bins += [(GroupPart(0, ()),)] * (-len(bins) % rounds_of)

    ordered = sorted((tuple(sorted(parts, key=_order)) for parts in bins), key=lambda parts: _order(parts[0]))
    seen: set[int] = set()
    plan = []
    for parts_of_bin in ordered:
        plan.append(tuple(replace(part, repeated=part.group in seen) for part in parts_of_bin))
        seen |= {part.group for part in parts_of_bin}
    return tuple(plan)


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


def _split_to_rounds(
    bins: Sequence[Bin], rounds_of: int, cost: Callable[[Bin], int], halves: Callable[[Bin], tuple[Bin, Bin] | None]
) -> list[Bin]:
    """Halve the costliest bin that can be, until their number is a multiple or none can be."""
    bins = list(bins)
    while len(bins) % rounds_of:
        for index in sorted(range(len(bins)), key=lambda i: (-cost(bins[i]), i)):
            parts = halves(bins[index])
            if parts is not None:
                bins[index : index + 1] = parts
                break
        else:
            break
    return bins
