"""Two sets of named tensors, compared bit by bit in bounded memory.

A tensor's hash is BLAKE2b (RFC 7693, 32 bytes) over its number format, its shape and its bytes, so that equal hashes
mean equal tensors wherever they are stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20
"""About what is held of each of the two tensors at a time."""


class Tensors(Protocol):
    """What can be compared: a ``TensorSource``, or a checkpoint under its own names (``StoredTensors``)."""

    def names(self) -> Sequence[str]: ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def dtypes(self) -> Mapping[str, torch.dtype]: ...

    def get_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` of dimension 0."""


@dataclass(frozen=True)
class TensorComparison:
    """One name in both sets. ``hash_b`` is ``hash_a`` where the tensors are equal.

    ``num_different`` elements differ in their bits, by at most ``max_difference`` in value (NaN where one of them is);
    both are None where format or shape differ, and elements have no partners.
    """

    name: str
    format_a: str
    format_b: str
    hash_a: str
    hash_b: str
    num_different: int | None = 0
    max_difference: float | None = 0.0

    @property
    def equal(self) -> bool:
        """To the bit."""
        return self.hash_a == self.hash_b

    def __str__(self) -> str:
        if self.format_a != self.format_b:
            return f"{self.name}: {self.format_a}, but {self.format_b}"
        return f"{self.name} {self.format_a}: {self.num_different} elements differ, by at most {self.max_difference:g}"


def compare(a: Tensors, b: Tensors, count: Callable[[int], None]) -> Iterator[TensorComparison]:
    """Every tensor that both sets have, in the order of names; ``count`` hears of the bytes of A's that were read."""
    shapes, dtypes = (a.shapes(), b.shapes()), (a.dtypes(), b.dtypes())
    for name in sorted(set(a.names()) & set(b.names())):
        formats = [f"{_short(of[name])} {list(shape[name])}" for of, shape in zip(dtypes, shapes, strict=True)]
        if formats[0] != formats[1]:
            hashes = [_hash(source, name, text) for source, text in zip((a, b), formats, strict=True)]
            count(num_bytes(shapes[0][name], dtypes[0][name]))
            yield TensorComparison(name, formats[0], formats[1], hashes[0], hashes[1], None, None)
        else:
            yield _compared(a, b, name, text=formats[0], shape=shapes[0][name], dtype=dtypes[0][name], count=count)


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """What a tensor takes."""
    return prod(shape) * dtype.itemsize


def _compared(
    a: Tensors,
    b: Tensors,
    name: str,
    *,
    text: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    count: Callable[[int], None],
) -> TensorComparison:
    """One pass over both; the second hash is a copy of the first until the tensors part."""
    hash_a, hash_b = _new_hash(text), None
    num_different, largest = 0, 0.0
    for start, stop in _ranges(shape, dtype):
        rows_a, rows_b = a.get_rows(name, start, stop), b.get_rows(name, start, stop)
        bytes_a, bytes_b = _bytes(rows_a), _bytes(rows_b)
        same = torch.equal(bytes_a, bytes_b)
        if not same and hash_b is None:
            hash_b = hash_a.copy()
        hash_a.update(bytes_a.numpy())
        if hash_b is not None:
            hash_b.update(bytes_b.numpy())
        count(bytes_a.numel())
        if not same:
            num_different += int((bytes_a != bytes_b).view(-1, dtype.itemsize).any(1).sum())
            gap = (rows_a.double() - rows_b.double()).abs().max()
            largest = max(largest, float(gap)) if not gap.isnan() else float("nan")
    digest = hash_a.hexdigest()
    return TensorComparison(
        name, text, text, digest, digest if hash_b is None else hash_b.hexdigest(), num_different, largest
    )


def _hash(source: Tensors, name: str, text: str) -> str:
    found = _new_hash(text)
    for start, stop in _ranges(source.shapes()[name], source.dtypes()[name]):
        found.update(_bytes(source.get_rows(name, start, stop)).numpy())
    digest: str = found.hexdigest()
    return digest


def _new_hash(text: str) -> Any:
    return hashlib.blake2b(text.encode(), digest_size=32)


def _ranges(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Rows that fit into ``CHUNK_BYTES`` together, at least one. A single number is one row."""
    step = max(1, CHUNK_BYTES // max(1, prod(shape[1:]) * dtype.itemsize))
    num_rows = shape[0] if shape else 1
    for start in range(0, num_rows, step):
        yield start, min(num_rows, start + step)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
