"""From a ``torch_dist`` checkpoint to the safetensors files of a Hugging Face folder: the plan and its execution."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prism_megatron.conversion.checkpoints.source import CheckpointSource
from prism_megatron.conversion.checkpoints.to_megatron import CHUNK_BYTES
from prism_megatron.conversion.hf.shards import Shard, ShardedFolder, Spec, lay_out
from prism_megatron.conversion.hf.stored_tensor import bytes_of
from prism_megatron.errors import ConversionError

UNIT_BYTES = 256 * 2**20
"""About as much is lost by each worker of an interrupted conversion."""


@dataclass(frozen=True)
class _Span:
    """Rows ``start`` to ``stop`` of a tensor, which belong at byte ``offset`` of the file."""

    name: str
    spec: Spec
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class ShardPart:
    """A range of one safetensors file: a unit of work (``work.Unit``). Any worker may write any part first."""

    file: str
    spans: tuple[_Span, ...]
    source: CheckpointSource
    num_bytes: int

    def run(self, folder: Path, count: Callable[[int], None]) -> None:
        """Write the range into the file, flushed; again, if an earlier run wrote it without noting so.

        Raises ConversionError for numbers that the format to write does not reach.
        """
        handle = os.open(folder / self.file, os.O_WRONLY)
        try:
            for span in self.spans:
                row_bytes = span.spec.row_bytes
                step = max(1, CHUNK_BYTES // row_bytes)
                for start in range(span.start, span.stop, step):
                    rows = _cast(self.source.get_rows(span.name, start, min(span.stop, start + step)), span)
                    _write_all(handle, rows, span.offset + (start - span.start) * row_bytes)
                    count(rows.nbytes)
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass(frozen=True)
class HFPlan:
    """The files, and the parts they are written in."""

    files: ShardedFolder
    parts: tuple[ShardPart, ...]

    def prepare(self, folder: Path) -> None:
        """Make the files in their full length, with their first bytes; what else stands in them already stays."""
        for shard in self.files.shards:
            handle = os.open(folder / shard.name, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.ftruncate(handle, shard.num_bytes)
                os.pwrite(handle, shard.head, 0)
                os.fsync(handle)
            finally:
                os.close(handle)
        self.files.write_index(folder)


def plan_hf(source: CheckpointSource, *, dtype: torch.dtype | None, shard_bytes: int) -> HFPlan:
    """Which tensors are written where, in the order of the layers; no weight is read. ``dtype`` None keeps each's."""
    stored = source.dtypes()
    specs = {name: Spec(shape, dtype or stored[name]) for name, shape in source.shapes().items()}
    files = lay_out(specs, shard_bytes)
    parts = [
        ShardPart(
            shard.name,
            tuple(spans),
            source,
            sum((span.stop - span.start) * span.spec.row_bytes for span in spans),
        )
        for shard in files.shards
        for spans in _units(shard, specs)
    ]
    return HFPlan(files, tuple(parts))


def _units(shard: Shard, specs: Mapping[str, Spec]) -> Iterator[list[_Span]]:
    """One file in ranges of about ``UNIT_BYTES``, tensors cut between rows where they are larger."""
    unit: list[_Span] = []
    room = UNIT_BYTES
    for name, begin in shard.begins.items():
        spec, start = specs[name], 0
        num_rows, row_bytes = spec.shape[0], spec.row_bytes
        while start < num_rows:
            stop = min(num_rows, start + max(1, room // row_bytes))
            unit.append(_Span(name, spec, start, stop, begin + start * row_bytes))
            room -= (stop - start) * row_bytes
            start = stop
            if room <= 0 or start < num_rows:
                yield unit
                unit, room = [], UNIT_BYTES
    if unit:
        yield unit


def _cast(rows: Tensor, span: _Span) -> Tensor:
    """``rows`` in the format to write. Rounding was asked for; infinity in place of a number was not."""
    cast = rows.to(span.spec.dtype)
    if span.spec.dtype == torch.float16 and (cast.isinf() & ~rows.isinf()).any():
        raise ConversionError(
            f"{span.name!r} holds numbers beyond {torch.finfo(cast.dtype).max:g}, the largest of fp16; "
            "write it with --dtype bf16 or fp32"
        )
    return cast


def _write_all(handle: int, tensor: Tensor, offset: int) -> None:
    view = bytes_of(tensor.contiguous())
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
