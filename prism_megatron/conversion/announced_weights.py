"""Weights on their way out of an engine, whose names and shapes are known before the first of them is gathered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet

from torch import Tensor


class AnnouncedWeights(Iterator[tuple[str, Tensor]]):
    """Full tensors under their Hugging Face names, each once, in an order of their own.

    ``shapes`` are those of all that come. ``left_out`` names weights of the model that do not, because they are what
    they were at the first export: training does not change them.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        tensors: Iterator[tuple[str, Tensor]],
        *,
        left_out: AbstractSet[str] = frozenset(),
    ) -> None:
        self.shapes = shapes
        self.left_out = left_out
        self._tensors = tensors

    def __next__(self) -> tuple[str, Tensor]:
        return next(self._tensors)


class WeightShare(AnnouncedWeights):
    """The part of an export that this rank brings; ``shapes`` and ``left_out`` are those of all ranks together.

    ``own_shapes`` are those of what comes here, and ``own_left_out`` names what would come if it were not left out.
    Each tensor is of one rank.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        tensors: Iterator[tuple[str, Tensor]],
        *,
        left_out: AbstractSet[str],
        own_shapes: Mapping[str, tuple[int, ...]],
        own_left_out: AbstractSet[str],
    ) -> None:
        super().__init__(shapes, tensors, left_out=left_out)
        self.own_shapes = own_shapes
        self.own_left_out = own_left_out


def left_out_of(tensors: object) -> AbstractSet[str]:
    """What ``tensors`` leave out; nothing where they announce nothing."""
    return tensors.left_out if isinstance(tensors, AnnouncedWeights) else frozenset()
