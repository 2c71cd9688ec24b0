"""An op seen as a rearrangement of rows, so that any part of its result is made from the rows it needs.

Every op but ``Transposed`` moves whole entries of dimension 0. Which goes where is read off the op itself: it is run
once, on row numbers in place of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from prism_megatron.conversion.mapping import WeightMapping
from prism_megatron.conversion.ops import Op

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """``count`` rows that stay together: from row ``origin`` of Hugging Face tensor ``part`` to row ``target``.

    ``part`` numbers the mapping's ``hf_names``; None stands for padding with zeros.
    """

    part: int | None
    origin: int
    target: int
    count: int


@lru_cache(maxsize=1024)
def runs(op: Op, rows: Shape) -> tuple[Run, ...]:
    """How ``op`` orders tensors of so many ``rows``, by ascending target; every target row is in one run."""
    numbers, begins, begin = [], [], 1  # 0 is the row that an op makes up
    for count in rows:
        numbers.append(torch.arange(begin, begin + count).unsqueeze(1))
        begins.append(begin)
        begin += count + 1  # a gap keeps runs from going on into the next tensor
    (ordered,) = op.split(numbers, 1)
    ordered = ordered.flatten()
    broken = (ordered[1:] != ordered[:-1] + 1) & ~((ordered[1:] == 0) & (ordered[:-1] == 0))
    starts = [0, *(torch.nonzero(broken).flatten() + 1).tolist()]
    stops = [*starts[1:], len(ordered)]
    found = []
    for start, stop in zip(starts, stops, strict=True):
        number = int(ordered[start])
        part = max((p for p, first in enumerate(begins) if first <= number), default=None)
        found.append(Run(part, 0 if part is None else number - begins[part], start, stop - start))
    return tuple(found)


def runs_of(mapping: WeightMapping) -> tuple[Run, ...]:
    """The runs of a mapping that is no slice of fused experts."""
    assert mapping.hf_shapes is not None and mapping.expert is None
    return runs(mapping.op, tuple(shape[0] for shape in mapping.hf_shapes))


def targets_of(mapping: WeightMapping, start: int, stop: int) -> Iterator[Run]:
    """The parts of runs that make rows ``start`` to ``stop`` of the parameter, in order."""
    for run in runs_of(mapping):
        first, last = max(start, run.target), min(stop, run.target + run.count)
        if first < last:
            yield Run(run.part, run.origin + first - run.target, first, last - first)


def origins_of(mapping: WeightMapping, part: int, start: int, stop: int) -> Iterator[Run]:
    """The parts of runs that hold rows ``start`` to ``stop`` of Hugging Face tensor ``part``, by ascending origin."""
    for run in sorted(runs_of(mapping), key=lambda run: run.origin):
        first, last = max(start, run.origin), min(stop, run.origin + run.count)
        if run.part == part and first < last:
            yield Run(part, first, run.target + first - run.origin, last - first)


def parameter_shape(mapping: WeightMapping) -> Shape:
    """The shape of the whole parameter: of one expert's, where the mapping is a slice of fused experts."""
    assert mapping.hf_shapes is not None
    skipped = 0 if mapping.expert is None else 1
    parts = [torch.empty(shape[skipped:], device="meta") for shape in mapping.hf_shapes]
    return tuple(mapping.op.split(parts, 1)[0].shape)
