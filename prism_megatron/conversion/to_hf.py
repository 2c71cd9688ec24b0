"""From a ``torch_dist`` checkpoint to the safetensors files of a Hugging Face folder: the plan and its execution."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from prism_megatron.conversion.mapping import WeightMapping
from prism_megatron.conversion.ops import Box
from prism_megatron.conversion.row_order import origins_of
from prism_megatron.conversion.shards import Shard, ShardedFolder, Spec, lay_out
from prism_megatron.conversion.stored_tensor import bytes_of
from prism_megatron.conversion.to_megatron import CHUNK_BYTES, checkpoint_key, checkpoint_tensors
from prism_megatron.conversion.torch_dist import TorchDistFolder
from prism_megatron.errors import ConversionError

UNIT_BYTES = 256 * 2**20
"""About as much is lost by each worker of an interrupted conversion."""


@dataclass(frozen=True)
class _HFTensor:
    """One tensor to write: part ``part`` of ``mappings``, one mapping or one for each expert of a fused tensor."""

    spec: Spec
    mappings: tuple[WeightMapping, ...]
    part: int


@dataclass(frozen=True)
class _Span:
    """Rows ``start`` to ``stop`` of a tensor, which belong at byte ``offset`` of the file."""

    tensor: _HFTensor
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class ShardPart:
    """A range of one safetensors file: a unit of work (``work.Unit``). Any worker may write any part first."""

    file: str
    spans: tuple[_Span, ...]
    folder: TorchDistFolder
    role: str
    num_bytes: int

    def run(self, folder: Path, count: Callable[[int], None]) -> None:
        """Write the range into the file, flushed; again, if an earlier run wrote it without noting so."""
        handle = os.open(folder / self.file, os.O_WRONLY)
        try:
            for span in self.spans:
                spec = span.tensor.spec
                for start, rows in self._rows(span):
                    _write_all(handle, rows.to(spec.dtype), span.offset + (start - span.start) * spec.row_bytes)
                    count(len(rows) * spec.row_bytes)
            os.fsync(handle)
        finally:
            os.close(handle)

    def _rows(self, span: _Span) -> Iterator[tuple[int, Tensor]]:
        """The rows of a span a few at a time, in no certain order, each time with the number of the first."""
        tensor = span.tensor
        first = tensor.mappings[0]
        key, expert = checkpoint_key(self.role, first.parameter)
        if first.expert is not None:  # one matrix of a fused tensor is small enough to be rearranged whole
            for number in range(span.start, span.stop):
                matrix = self.folder.read(key, number, number + 1)[0]
                yield number, tensor.mappings[number].op.merge([matrix])[tensor.part].unsqueeze(0)
            return
        width = self.folder.shape(key)[1:] if expert is None else self.folder.shape(key)[2:]
        step = max(1, CHUNK_BYTES // (prod(width) * self.folder.dtype(key).itemsize))
        for run in origins_of(first, tensor.part, span.start, span.stop):
            for skipped in range(0, run.count, step):
                size = (min(step, run.count - skipped), *width)
                box = Box((run.target + skipped, *(0 for _ in width)), size)
                if expert is not None:
                    box = Box((expert, *box.offset), (1, *box.size))
                yield run.origin + skipped, self.folder.read_box(key, box).view(size[0], *tensor.spec.shape[1:])


@dataclass(frozen=True)
class HFPlan:
    """The files, and the parts they are written in."""

    files: ShardedFolder
    parts: tuple[ShardPart, ...]

    def prepare(self, folder: Path) -> None:
        """Make the files in their full length, with their first bytes; what else stands in them already stays."""
        for shard in self.files.shards:
            handle = os.open(folder / shard.name, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.ftruncate(handle, shard.num_bytes)
                os.pwrite(handle, shard.head, 0)
                os.fsync(handle)
            finally:
                os.close(handle)
        self.files.write_index(folder)


def plan_hf(
    mappings: Sequence[WeightMapping],
    folder: TorchDistFolder,
    *,
    role: str,
    aliases: Sequence[str],
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> HFPlan:
    """Which tensors are written where; no weight is read. ``dtype`` None keeps each tensor's.

    Raises ConversionError for a checkpoint whose tensors of ``role`` are not those of the mappings.
    """
    check_keys(mappings, folder, role)
    tensors = dict(_tensors(mappings, folder, role, aliases, dtype))
    files = lay_out({name: tensor.spec for name, tensor in tensors.items()}, shard_bytes)
    parts = [
        ShardPart(
            shard.name,
            tuple(spans),
            folder,
            role,
            sum((span.stop - span.start) * span.tensor.spec.row_bytes for span in spans),
        )
        for shard in files.shards
        for spans in _units(shard, tensors)
    ]
    return HFPlan(files, tuple(parts))


def check_keys(mappings: Sequence[WeightMapping], folder: TorchDistFolder, role: str) -> None:
    """Raise ConversionError unless the checkpoint's tensors of ``role`` are those of the mappings, shapes included."""
    wanted = checkpoint_tensors(role, mappings)
    held = {key for key in folder.keys() if key.startswith(f"{role}.")}  # noqa: SIM118 - no mapping
    for problem, keys, others in (
        ("lacks {} tensors of the model, first", wanted.keys() - held, held - wanted.keys() or held),
        ("holds {} tensors that are not the model's, first", held - wanted.keys(), wanted.keys()),
    ):
        if keys:
            near = difflib.get_close_matches(min(keys), sorted(others), n=1)
            hint = f" (nearest: {near[0]!r})" if near else ""
            raise ConversionError(f"{folder.folder} {problem.format(len(keys))} {min(keys)!r}{hint}")
    for key, shape in wanted.items():
        if folder.shape(key) != shape:
            raise ConversionError(
                f"{folder.folder}: {key!r} has shape {folder.shape(key)}, but the model's config makes it {shape}"
            )


def _tensors(
    mappings: Sequence[WeightMapping],
    folder: TorchDistFolder,
    role: str,
    aliases: Sequence[str],
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, _HFTensor]]:
    """All tensors in the order of the mappings, which is that of the layers."""
    by_name: dict[str, list[tuple[WeightMapping, int]]] = {}
    for mapping in mappings:
        for part, name in enumerate(mapping.hf_names):
            by_name.setdefault(name, []).append((mapping, part))
        if mapping.optional_alias is not None and mapping.optional_alias in aliases:
            by_name[mapping.optional_alias] = [(mapping, 0)]
    for name, found in by_name.items():
        first, part = found[0]
        assert first.hf_shapes is not None
        stored = folder.dtype(checkpoint_key(role, first.parameter)[0])
        spec = Spec(first.hf_shapes[part], dtype or stored)
        yield name, _HFTensor(spec, tuple(mapping for mapping, _ in found), part)


def _units(shard: Shard, tensors: Mapping[str, _HFTensor]) -> Iterator[list[_Span]]:
    """One file in ranges of about ``UNIT_BYTES``, tensors cut between rows where they are larger."""
    unit: list[_Span] = []
    room = UNIT_BYTES
    for name, begin in shard.begins.items():
        tensor, start = tensors[name], 0
        num_rows, row_bytes = tensor.spec.shape[0], tensor.spec.row_bytes
        while start < num_rows:
            stop = min(num_rows, start + max(1, room // row_bytes))
            unit.append(_Span(tensor, start, stop, begin + start * row_bytes))
            room -= (stop - start) * row_bytes
            start = stop
            if room <= 0 or start < num_rows:
                yield unit
                unit, room = [], UNIT_BYTES
    if unit:
        yield unit


def _write_all(handle: int, tensor: Tensor, offset: int) -> None:
    view = bytes_of(tensor.contiguous())
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
