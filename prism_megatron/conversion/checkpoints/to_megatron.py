"""From named Hugging Face tensors to a ``torch_dist`` checkpoint: the plan, from headers alone, and its execution.

A checkpoint is written for one layout (its ranks read whole chunks, each stage its own files) and loads in any.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.conversion.checkpoints.row_order import parameter_shape, targets_of
from prism_megatron.conversion.checkpoints.torch_dist_writer import WrittenChunk, write_data_file
from prism_megatron.conversion.mapping import TensorSource, WeightMapping
from prism_megatron.conversion.ops import Box
from prism_megatron.errors import ConversionError

CHUNK_BYTES = 16 * 2**20
"""Most bytes of the rows that a chunk is cut from. Blocks of this size stay in the allocator: larger ones go back to
the kernel each time, which costs as much as copying them."""

_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_FIRST_STAGE = ("vision_model.", "embedding.")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Chunk:
    """A box of a mapping's parameter, and of the checkpoint's tensor ``key``, which stacks all experts of a layer."""

    mapping: WeightMapping
    of_parameter: Box
    key: str
    of_key: Box
    dtype: torch.dtype


@dataclass(frozen=True)
class DataFile:
    """One data file: a unit of work (``work.Unit``)."""

    name: str
    chunks: tuple[_Chunk, ...]
    source: TensorSource
    num_bytes: int

    def run(self, folder: Path, count: Callable[[int], None]) -> list[int]:
        """Write it; returns the lengths of its archives."""
        return write_data_file(folder / self.name, self._tensors(), count)

    def _tensors(self) -> Iterator[Tensor]:
        for mapping, chunks in itertools.groupby(self.chunks, key=lambda chunk: chunk.mapping):
            rows = _Rows(mapping, self.source)
            for chunk in chunks:
                yield rows.box(chunk.of_parameter, chunk.dtype).view(chunk.of_key.size)


@dataclass(frozen=True)
class MegatronPlan:
    """The data files, and shape and number format of every tensor."""

    files: tuple[DataFile, ...]
    tensors: Mapping[str, tuple[Shape, torch.dtype]]

    def written(self, lengths: Sequence[Sequence[int]]) -> list[WrittenChunk]:
        """Where everything lies, from what the data files returned."""
        found = []
        for file, of_file in zip(self.files, lengths, strict=True):
            begins = itertools.accumulate(of_file, initial=0)
            for chunk, length, begin in zip(file.chunks, of_file, begins, strict=False):
                found.append(WrittenChunk(chunk.key, chunk.of_key, file.name, begin, length))
        return found


def checkpoint_key(role: str, parameter: str) -> tuple[str, int | None]:
    """The name under which a checkpoint stores a parameter, and its place in dimension 0 where that stacks experts."""
    expert = _EXPERT.search(parameter)
    if expert is None:
        return f"{role}.{parameter}", None
    return f"{role}.{parameter.replace(expert[0], '.experts.', 1)}", int(expert[1])


def checkpoint_tensors(role: str, mappings: Sequence[WeightMapping]) -> dict[str, Shape]:
    """The shape of every tensor that a checkpoint of these mappings holds."""
    shapes: dict[str, Shape] = {}
    for mapping in mappings:
        key, expert = checkpoint_key(role, mapping.parameter)
        shape = parameter_shape(mapping)
        # Experts come in ascending order: the last one tells how many there are.
        shapes[key] = shape if expert is None else (expert + 1, *shape)
    return shapes


def plan_megatron(
    mappings: Sequence[WeightMapping],
    source: TensorSource,
    *,
    role: str,
    parallel: ParallelConfig,
    bucket_bytes: int,
) -> MegatronPlan:
    """Which tensors are written in which chunks to which files; no weight is read.

    Raises ConversionError where tensors that become one have several number formats.
    """
    num_layers = 1 + max(int(found[1]) for mapping in mappings if (found := _LAYER.match(mapping.parameter)))
    stages = layer_stages(parallel, num_layers)
    shapes = checkpoint_tensors(role, mappings)
    dtypes = _dtypes(mappings, source, role)
    groups: dict[tuple[int, int], list[_Chunk]] = {}
    for mapping in mappings:
        key, expert = checkpoint_key(role, mapping.parameter)
        ep_rank = -1 if expert is None else expert * parallel.ep // shapes[key][0]
        group = groups.setdefault((_stage_of(mapping.parameter, stages, parallel.pp), ep_rank), [])
        for box in _boxes(mapping, parallel.tp if expert is None else parallel.expert_tp, dtypes[key]):
            of_key = box if expert is None else Box((expert, *box.offset), (1, *box.size))
            group.append(_Chunk(mapping, box, key, of_key, dtypes[key]))
    files: list[DataFile] = []
    for (stage, _), chunks in sorted(groups.items(), key=lambda item: item[0]):
        for bucket, size in _buckets(chunks, bucket_bytes):
            number = sum(file.name.startswith(f"__{stage}_") for file in files)
            files.append(DataFile(f"__{stage}_{number}.distcp", tuple(bucket), source, size))
    return MegatronPlan(tuple(files), {key: (shape, dtypes[key]) for key, shape in shapes.items()})


def layer_stages(parallel: ParallelConfig, num_layers: int) -> list[int]:
    """The pipeline stage of each layer; with virtual stages each holds several runs of layers, taken in turns."""
    counts = parallel.stage_layers(num_layers)
    return [
        stage for _ in range(parallel.vpp) for stage, count in enumerate(counts) for _ in range(count // parallel.vpp)
    ]


def _stage_of(parameter: str, stages: Sequence[int], pp: int) -> int:
    if parameter.startswith(_FIRST_STAGE):
        return 0
    layer = _LAYER.match(parameter)
    return pp - 1 if layer is None else stages[int(layer[1])]


def _dtypes(mappings: Sequence[WeightMapping], source: TensorSource, role: str) -> dict[str, torch.dtype]:
    held = source.dtypes()
    dtypes: dict[str, torch.dtype] = {}
    first: dict[str, str] = {}
    for mapping in mappings:
        key, _ = checkpoint_key(role, mapping.parameter)
        for name in mapping.hf_names:
            if dtypes.setdefault(key, held[name]) != held[name]:
                raise ConversionError(
                    f"{name!r} is {held[name]} but {first[key]!r} is {dtypes[key]}, and both become {key!r}; "
                    "save the model in one number format"
                )
            first.setdefault(key, name)
    return dtypes


def _boxes(mapping: WeightMapping, tp: int, dtype: torch.dtype) -> Iterator[Box]:
    """The parameter cut as ``tp`` ranks share it, further along dimension 0 so that little is in memory."""
    shape = parameter_shape(mapping)
    try:
        shares = mapping.op.pieces(shape, tp)
    except ValueError:  # padded rows that do not divide: ranks of that layout read parts of chunks
        shares = mapping.op.pieces(shape, 1)
    step = max(1, CHUNK_BYTES // (prod(shape[1:]) * dtype.itemsize))
    for box in sorted({box for share in shares for box in share}):
        for row in range(0, box.size[0], step):
            height = min(step, box.size[0] - row)
            yield Box((box.offset[0] + row, *box.offset[1:]), (height, *box.size[1:]))


def _buckets(chunks: Sequence[_Chunk], bucket_bytes: int) -> Iterator[tuple[list[_Chunk], int]]:
    bucket: list[_Chunk] = []
    size = 0
    for chunk in chunks:
        num_bytes = prod(chunk.of_key.size) * chunk.dtype.itemsize
        if bucket and size + num_bytes > bucket_bytes:
            yield bucket, size
            bucket, size = [], 0
        bucket.append(chunk)
        size += num_bytes
    yield bucket, size


class _Rows:
    """The parameter of one mapping, made as its boxes ask for it; keeps the rows that it made last."""

    def __init__(self, mapping: WeightMapping, source: TensorSource) -> None:
        self._mapping = mapping
        self._source = source
        self._range = (0, 0)
        self._rows = torch.empty(0)

    def box(self, box: Box, dtype: torch.dtype) -> Tensor:
        """One box, contiguous, in memory of its own."""
        wanted = (box.offset[0], box.offset[0] + box.size[0])
        if self._mapping.expert is not None:
            wanted = (0, parameter_shape(self._mapping)[0])
        if wanted != self._range:
            self._range = wanted
            self._rows = self._read(*wanted, dtype)
        first = box.offset[0] - wanted[0]
        part = self._rows[first : first + box.size[0]]
        if len(box.size) > 1:
            part = part[:, box.offset[1] : box.offset[1] + box.size[1]]
        # What torch.save writes is the whole storage.
        alone = part.nbytes == self._rows.untyped_storage().nbytes()
        return part if alone else part.clone(memory_format=torch.contiguous_format)

    def _read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        mapping = self._mapping
        if mapping.expert is not None:  # a slice, small enough to be rearranged whole
            (matrix,) = mapping.op.split(mapping.read(self._source), 1)
            return matrix
        found = list(targets_of(mapping, start, stop))
        width = parameter_shape(mapping)[1:]
        if len(found) == 1 and found[0].part is not None:
            return self._part(found[0].part, found[0].origin, found[0].count).reshape(-1, *width)
        rows = torch.zeros((stop - start, *width), dtype=dtype)
        for run in found:
            if run.part is not None:
                target = rows[run.target - start : run.target - start + run.count]
                target.copy_(self._part(run.part, run.origin, run.count).reshape(target.shape))
        return rows

    def _part(self, part: int, origin: int, count: int) -> Tensor:
        return self._source.get_rows(self._mapping.hf_names[part], origin, origin + count)


def record(expert_layout: str | None, aliases: Sequence[str]) -> dict[str, Any]:
    """What ``state.json`` keeps of a model, so that it can become what it was."""
    return {"expert_layout": expert_layout, "aliases": sorted(aliases)}
