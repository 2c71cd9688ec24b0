"""Reads the tensors of a ``torch_dist`` checkpoint folder: any part of any tensor, without Megatron, nothing unpickled
but what torch calls weights.

A data file is a row of ``torch.save`` archives, one for each chunk of a tensor; the index says which chunk lies where.
An archive keeps its numbers uncompressed, so once its head is known, rows are read straight from the file.
"""

from __future__ import annotations

import io
import itertools
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from prism_megatron.conversion.boxes import intersection
from prism_megatron.conversion.checkpoints.folder import read_checkpoint
from prism_megatron.conversion.hf.stored_tensor import StoredTensor
from prism_megatron.conversion.ops import Box
from prism_megatron.errors import CheckpointError

_LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True)
class _Chunk:
    box: Box
    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]


class TorchDistFolder:
    """The tensors of a checkpoint, of training or converted. ``document`` is its ``state.json``.

    Opening holds the index to the files (``conversion/checkpoints/index.py``). Safe to use from several threads.
    """

    def __init__(self, folder: str | Path, checked: tuple[dict[str, Any], Metadata] | None = None) -> None:
        """``checked`` is what ``read_checkpoint`` gave for the folder, where another process has read it.

        Raises CheckpointError for a folder that is incomplete, damaged or hostile.
        """
        self.folder = Path(folder)
        self.document, index = checked or read_checkpoint(self.folder)
        self._entries = dict(_entries(self.folder, index))
        self._heads: dict[_Chunk, StoredTensor] = {}
        self._lock = threading.Lock()

    def keys(self) -> Sequence[str]:
        """All tensor names, sorted."""
        return sorted(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """The whole tensor's shape. Raises CheckpointError for a key the folder does not hold, as all below do."""
        return self._entry(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """The number format."""
        return self._entry(key).dtype

    def num_chunks(self, key: str) -> int:
        """In how many pieces a tensor is stored."""
        return len(self._entry(key).chunks)

    def files(self) -> Sequence[Path]:
        """The data files, sorted."""
        return sorted({chunk.path for entry in self._entries.values() for chunk in entry.chunks})

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Entries ``start`` to ``stop`` of dimension 0."""
        shape = self.shape(key)
        return self.read_box(key, Box((start, *(0 for _ in shape[1:])), (stop - start, *shape[1:])))

    def read_box(self, key: str, box: Box) -> Tensor:
        """One box of a tensor, put together from the parts of chunks that lie in it."""
        entry = self._entry(key)
        for chunk in entry.chunks:
            if len(box.size) <= 2 and intersection(box, chunk.box) == box and box.size[1:] == chunk.box.size[1:]:
                first = box.offset[0] - chunk.box.offset[0]
                return self._head(chunk, entry.dtype).rows(first, first + box.size[0])
        out = torch.empty(box.size, dtype=entry.dtype)
        for chunk in entry.chunks:
            common = intersection(box, chunk.box)
            if common is not None:
                self._copy(out, box, chunk, common, entry.dtype)
        return out

    def _copy(self, out: Tensor, box: Box, chunk: _Chunk, common: Box, dtype: torch.dtype) -> None:
        """Fill the part ``common`` of ``out``, matrix by matrix: the last two dimensions of a stack of any depth."""
        depth = max(0, len(common.size) - 2)
        in_chunk = tuple(c - o for c, o in zip(common.offset, chunk.box.offset, strict=True))
        in_out = tuple(c - o for c, o in zip(common.offset, box.offset, strict=True))
        height = common.size[depth]
        # The chunk as one tall matrix, of which only the rows asked for are read.
        head = self._head(chunk, dtype)
        tall = replace(head, shape=(prod(head.shape[: depth + 1]), *head.shape[depth + 1 :]))
        for place in itertools.product(*map(range, common.size[:depth])):
            number = 0
            for step, begin, count in zip(place, in_chunk, head.shape, strict=False):
                number = number * count + begin + step
            first = number * head.shape[depth] + in_chunk[depth]
            rows = tall.rows(first, first + height)
            target = out[tuple(begin + step for begin, step in zip(in_out, place, strict=False))]
            target = target.narrow(0, in_out[depth], height)
            if len(common.size) > 1:
                rows = rows.narrow(1, in_chunk[-1], common.size[-1])
                target = target.narrow(1, in_out[-1], common.size[-1])
            target.copy_(rows)

    def _entry(self, key: str) -> _Entry:
        if key not in self._entries:
            raise CheckpointError(f"{self.folder} holds no tensor {key!r}")
        return self._entries[key]

    def _head(self, chunk: _Chunk, dtype: torch.dtype) -> StoredTensor:
        with self._lock:
            known = self._heads.get(chunk)
        if known is None:
            known = _read_head(chunk, dtype)
            with self._lock:
                self._heads[chunk] = known
        return known


def _entries(folder: Path, index: Metadata) -> Iterator[tuple[str, _Entry]]:
    """The tensors of an index that ``read_checkpoint`` has passed."""
    for key, tensor in index.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        chunks = []
        for chunk in tensor.chunks:
            place = index.storage_data[MetadataIndex(key, chunk.offsets)]
            box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
            chunks.append(_Chunk(box, folder / place.relative_path, place.offset, place.length))
        yield key, _Entry(tuple(tensor.size), tensor.properties.dtype, tuple(chunks))


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._offset, self._length, self._position = offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(view) or 0
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_head(chunk: _Chunk, dtype: torch.dtype) -> StoredTensor:
    """Where the numbers of one archive lie; torch's weights-only reader says of what shape and format they are."""
    try:
        with io.BufferedReader(_Window(chunk.path, chunk.offset, chunk.length), 4096) as window:
            with torch.serialization.skip_data():
                tensor = torch.load(window, weights_only=True)
            if not isinstance(tensor, Tensor):
                raise ValueError(f"holds {type(tensor).__name__}")
            with zipfile.ZipFile(window) as archive:
                (entry,) = (item for item in archive.infolist() if item.filename.split("/", 1)[-1] == "data/0")
            window.seek(entry.header_offset)
            header = window.read(_LOCAL_HEADER_BYTES)
            names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            first = entry.header_offset + _LOCAL_HEADER_BYTES + names
            # A file can be made so that torch, and Megatron with it, finds other numbers in it than zipfile does.
            window.seek(0)
            records: Any = torch._C.PyTorchFileReader(window)
            held = [name for name in records.get_all_records() if name.lower().startswith("data/")]
            place = records.get_record_offset("data/0"), records.get_record_size("data/0")
            if held != ["data/0"] or place != (first, entry.file_size):
                raise ValueError("an archive that can be read in two ways")
    except Exception as error:
        raise CheckpointError(
            f"{chunk.path} at byte {chunk.offset}: no tensor that torch.save wrote "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); copy the file again"
        ) from error
    if tuple(tensor.shape) != chunk.box.size or tensor.dtype != dtype or not tensor.is_contiguous():
        raise CheckpointError(
            f"{chunk.path} at byte {chunk.offset}: a tensor of {tuple(tensor.shape)} in {tensor.dtype}, but the index "
            f"says {chunk.box.size} in {dtype}; do not use this checkpoint"
        )
    begin = first + int(tensor.storage_offset()) * dtype.itemsize
    end = first + entry.file_size
    if entry.compress_type != zipfile.ZIP_STORED or end > chunk.length or begin + tensor.nbytes > end:
        raise CheckpointError(f"{chunk.path} at byte {chunk.offset}: the archive is cut off; copy the file again")
    return StoredTensor(chunk.path, chunk.offset + begin, chunk.box.size, dtype)
