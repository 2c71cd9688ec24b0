"""A checkpoint on its way to the disk: each rank's data file, at once or beside the steps, and the rename that counts.

Threads write and nothing else; whatever ranks have to agree on is agreed on by their main threads (``Saving``).
"""

from __future__ import annotations

import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from prism_megatron.conversion.checkpoints.folder import COMPANIONS_FOLDER, flush_folder
from prism_megatron.conversion.checkpoints.index import check_index
from prism_megatron.conversion.checkpoints.torch_dist_writer import WrittenChunk, write_data_file, write_index
from prism_megatron.disk import disk_error, writing
from prism_megatron.engine.pieces import Piece
from prism_megatron.errors import CheckpointError, PrismError
from prism_megatron.parallel.collectives import all_gather_objects, gather_objects, on_main

SAVING = ".saving"
REPLACED = ".replaced"


@dataclass(frozen=True)
class _Written:
    """What a rank has written: whole tensors by name, with shape and format, and its chunks of them."""

    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    chunks: Sequence[WrittenChunk]


class Writing:
    """This rank's data file, written by the caller or, ``aside``, by a thread from copies in host memory.

    By the caller one block is in host memory at a time. Aside all of them are from the start, and each is given up
    when it is written: training may change what they were copied from.
    """

    def __init__(self, path: Path, pieces: Sequence[Piece], *, aside: bool) -> None:
        """``pieces`` are those that this rank writes, into ``path``; without any there is no file."""
        self.problem: PrismError | None = None
        """why the file could not be written, once it is done"""
        self._path = path
        self._places = [(piece.key, piece.box) for piece in pieces]
        self._tensors = {piece.key: (piece.shape, piece.tensor.dtype) for piece in pieces}
        self._lengths: list[int] = []
        self._abandoned = threading.Event()
        self._thread: threading.Thread | None = None
        if aside:
            staged = deque(map(_host_copy, pieces))
            self._thread = threading.Thread(
                target=self._write, args=(_drained(staged),), name=f"writes {path.name}", daemon=True
            )
            self._thread.start()
        else:
            self._write(map(_host_copy, pieces))

    @property
    def is_done(self) -> bool:
        """Whether the file is written and flushed, or never will be."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> _Written:
        """What is written, once it is done."""
        if self._thread is not None:
            self._thread.join()
        begin, chunks = 0, []
        for (key, box), length in zip(self._places, self._lengths, strict=self.problem is None):
            chunks.append(WrittenChunk(key, box, self._path.name, begin, length))
            begin += length
        return _Written(self._tensors, chunks)

    def abandon(self) -> None:
        """Write no further block, and wait for the one under way."""
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join()

    def _write(self, tensors: Iterator[Tensor]) -> None:
        try:
            if self._places:
                self._lengths = write_data_file(self._path, self._until_abandoned(tensors), lambda _count: None)
        except Exception as error:  # noqa: BLE001  # told to all ranks by ``Saving.finish``
            folder = self._path.parent
            self.problem = disk_error(error, folder) or CheckpointError(
                f"{folder} cannot be written: {type(error).__name__}: {error}"
            )

    def _until_abandoned(self, tensors: Iterator[Tensor]) -> Iterator[Tensor]:
        for tensor in tensors:
            if self._abandoned.is_set():
                return  # what there is of the file is no part of any checkpoint; the next save removes it
            yield tensor


class Saving:
    """A save of all ranks. The checkpoint is there when :meth:`finish` returns; until then, what was there before."""

    def __init__(self, folder: Path, hidden: Path, own: Writing, describe: Callable[[], None]) -> None:
        """``describe`` writes what stands beside the tensors into ``hidden``, on rank 0."""
        self.folder = folder
        self._hidden = hidden
        self._own = own
        self._describe = describe

    def is_written(self) -> bool:
        """Whether :meth:`finish` would return at once. All ranks together."""
        return all(all_gather_objects(self._own.is_done))

    def finish(self) -> None:
        """Wait until all ranks have written and flushed, then make it the checkpoint. All ranks together.

        Raises on every rank what one of them met: DiskError for a full disk, CheckpointError for anything else.
        """
        written = self._own.wait()
        problem = next((found for found in all_gather_objects(self._own.problem) if found is not None), None)
        if problem is not None:
            if dist.get_rank() == 0:  # nobody writes any more, and there is to be room again
                shutil.rmtree(self._hidden, ignore_errors=True)
            raise problem
        gathered = gather_objects(written)
        on_main(lambda: self._commit(gathered or []))

    def abandon(self) -> None:
        """Leave it: its folder is never taken for a checkpoint. By each rank for itself, for a run that failed."""
        self._own.abandon()

    def _commit(self, gathered: Sequence[_Written]) -> None:
        with writing(self.folder):
            tensors = {key: found for written in gathered for key, found in written.tensors.items()}
            index = write_index(self._hidden, tensors, [chunk for written in gathered for chunk in written.chunks])
            check_index(index, self._hidden)  # ranks shared the tensors out without a word: are they all there?
            self._describe()
            commit(self._hidden, self.folder)


def commit(hidden: Path, folder: Path) -> None:
    """Make ``hidden`` the checkpoint ``folder`` by a rename; an older one of the same step steps aside first."""
    if (hidden / COMPANIONS_FOLDER).is_dir():
        flush_folder(hidden / COMPANIONS_FOLDER)
    flush_folder(hidden)
    replaced = folder.with_name(f".{folder.name}{REPLACED}")
    if folder.exists():
        folder.rename(replaced)
    hidden.rename(folder)
    flush_folder(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _host_copy(piece: Piece) -> Tensor:
    """The piece in host memory with a storage of its own: ``torch.save`` writes whole storages."""
    host = torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype)
    return host.copy_(piece.tensor)


def _drained(staged: deque[Tensor]) -> Iterator[Tensor]:
    """Each in turn; nobody else holds on to it."""
    while staged:
        yield staged.popleft()
