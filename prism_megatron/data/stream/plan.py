"""What a run trains on, step by step, planned from lengths alone: the same for every number of ranks and workers.

An epoch's samples come in windows; those of a window are packed into rows of at most so many tokens, and the packs of
all windows and epochs, in their order, make the steps. Where a run is, is three numbers (``Position``), whatever its
layout, and a step's packs are dealt out to the data-parallel ranks there are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from prism_megatron.data.index.samples import Samples
from prism_megatron.data.scenes import keyed_generator
from prism_megatron.data.stream.mixture import Mixture, Order
from prism_megatron.data.stream.packing import best_fit, slots, spread
from prism_megatron.errors import DataError

WINDOW = 8192
"""Samples that are packed together: enough to fill packs, few enough to plan in a moment."""

Pack = npt.NDArray[np.int64]
"""Numbers of the samples in one row."""


@dataclass(frozen=True)
class Packing:
    """How rows are filled: with at most ``budget`` tokens, in slots of a multiple; None for one sample to a row."""

    budget: int | None
    multiple: int


@dataclass(frozen=True)
class Cost:
    """What a sample costs to train on, in any unit: by its tokens, by pairs of them, and by its visual tokens."""

    token: float
    token_pair: float
    visual_token: float

    def of(self, samples: Samples, pack: Pack) -> float:
        """The cost of a pack, whose samples do not see each other."""
        visual = samples.visual_tokens[pack].astype(np.float64)
        tokens = samples.text_tokens[pack] + visual
        return float((self.token * tokens + self.token_pair * tokens**2 + self.visual_token * visual).sum())


class Position(NamedTuple):
    """What has been trained on: all before this window of this epoch, and so many packs of it."""

    epoch: int
    window: int
    packs: int


START = Position(0, 0, 0)


@dataclass(frozen=True, eq=False)
class Step:
    """The packs of one step, of all ranks together, and where the run is after it."""

    packs: list[Pack]
    after: Position

    def shares(self, samples: Samples, cost: Cost, *, dp_size: int) -> list[list[Pack | None]]:
        """The packs of each data-parallel rank, equally many, in an order of falling cost; None fills up."""
        costs = [cost.of(samples, pack) for pack in self.packs]
        room = -(-len(self.packs) // dp_size)
        return [
            [*(self.packs[position] for position in share), *[None] * (room - len(share))]
            for share in spread(costs, dp_size)
        ]


class Plan:
    """All packs of a run in their order. Costs about 20 bytes a sample beside the samples."""

    def __init__(self, samples: Samples, mixture: Mixture, *, packing: Packing, seed: int, epochs: int) -> None:
        """Raises DataError for a sample that is longer than a pack."""
        self.samples, self._mixture = samples, mixture
        self._packing, self._seed, self._epochs = packing, seed, epochs
        self._slots = slots(samples.tokens, multiple=packing.multiple)
        if packing.budget is not None and (longest := int(self._slots.max())) > packing.budget:
            raise DataError(
                f"a sample takes {longest} tokens, rounded up to a multiple of {packing.multiple}; at most "
                f"{packing.budget} fit a row"
            )
        self._epoch: tuple[int, Order] | None = None
        self._window: tuple[tuple[int, int], list[Pack]] | None = None

    @cached_property
    def packs_of_windows(self) -> list[list[int]]:
        """How many packs every window of every epoch has. Planned once, at about 0.03 s a window."""
        return [
            [len(self.packs(epoch, window)) for window in range(self._num_windows(epoch))]
            for epoch in range(self._epochs)
        ]

    @property
    def num_packs(self) -> int:
        """Of all epochs."""
        return sum(map(sum, self.packs_of_windows))

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint keeps: a run goes on by a plan of the same identity. JSON can hold it."""
        packing = self._packing
        whole = [WINDOW, packing.budget, packing.multiple, self._seed, self._mixture.identity, self.samples.digest]
        return {"samples": len(self.samples), "digest": hashlib.sha256(json.dumps(whole).encode()).hexdigest()}

    def num_steps(self, packs_per_step: int, start: Position = START) -> int:
        """Steps that are left from a position; the last one of every epoch may be short."""
        left = [sum(packs) for packs in self.packs_of_windows[start.epoch :]]
        if left:
            left[0] -= sum(self.packs_of_windows[start.epoch][: start.window]) + start.packs
        return sum(-(-packs // packs_per_step) for packs in left)

    def steps(self, packs_per_step: int, start: Position = START) -> Iterator[Step]:
        """Every step from a position to the end of the last epoch.

        None reaches from one epoch into the next: more epochs than were planned at first change no step.
        """
        packs: list[Pack] = []
        for after, pack in self._packs_from(start):
            packs.append(pack)
            if len(packs) == packs_per_step or after[1:] == (0, 0):
                yield Step(packs, after)
                packs = []

    def packs(self, epoch: int, window: int) -> list[Pack]:
        """The packs of one window, in the order in which they are trained on."""
        if self._window is None or self._window[0] != (epoch, window):
            self._window = ((epoch, window), self._planned(epoch, window))
        return self._window[1]

    def fill(self, packs: list[Pack]) -> float:
        """Tokens in packs, of what they could hold: 1 if nothing is padding."""
        taken = sum(int(self.samples.tokens[pack].sum()) for pack in packs)
        widths = (self._packing.budget or int(self._slots[pack].max()) for pack in packs)
        return taken / sum(widths)

    def _planned(self, epoch: int, window: int) -> list[Pack]:
        members = self._order(epoch)[window * WINDOW : (window + 1) * WINDOW]
        if self._packing.budget is None:
            return list(members[:, None])
        packs = best_fit(
            self._slots[members] // self._packing.multiple, budget=self._packing.budget // self._packing.multiple
        )
        # Best fit begins with the longest samples; training must not.
        order = keyed_generator("packs", self._seed, epoch, window).permutation(len(packs))
        return [members[packs[position]] for position in order]

    def _packs_from(self, start: Position) -> Iterator[tuple[Position, Pack]]:
        """Packs with the position after each."""
        for epoch in range(start.epoch, self._epochs):
            first = start.window if epoch == start.epoch else 0
            for window in range(first, num_windows := self._num_windows(epoch)):
                packs = self.packs(epoch, window)
                skipped = start.packs if (epoch, window) == start[:2] else 0
                for number in range(skipped, len(packs)):
                    after = Position(epoch, window, number + 1)
                    if number + 1 == len(packs):
                        last = window + 1 == num_windows
                        after = Position(epoch + 1, 0, 0) if last else Position(epoch, window + 1, 0)
                    yield after, packs[number]

    def _num_windows(self, epoch: int) -> int:
        return -(-len(self._order(epoch)) // WINDOW)

    def _order(self, epoch: int) -> Order:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._mixture.epoch(epoch))
        return self._epoch[1]
