"""The pickled parts of a checkpoint, read by an unpickler that runs nothing: unpickling calls whatever the file names.

torch and Megatron read a ``torch_dist`` checkpoint's index (``.metadata``) with plain ``pickle``. Everything here reads
it with one that resolves nothing but the classes such an index is made of, and before Megatron may read it too.
Archives are opened by torch's reader: zipfile finds other entries in a file that was made to have two readings.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.metadata import Metadata

from prism_megatron.errors import CheckpointError

_INDEX_GLOBALS = frozenset(
    {
        "collections.OrderedDict",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
        "torch.Size",
        "torch.serialization._get_layout",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        *(
            f"torch.distributed.checkpoint.metadata.{name}"
            for name in (
                "Metadata",
                "MetadataIndex",
                "ChunkStorageMetadata",
                "TensorProperties",
                "TensorStorageMetadata",
                "StorageMeta",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        *(f"torch.{dtype}" for dtype in ("float32", "float64", "float16", "bfloat16", "uint8", "int32", "int64")),
    }
)


_ZIP_MAGIC, _ZIP_END, _ZIP_END_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22
_MAX_SHOWN = 120
_MAX_OBJECT_BYTES = 2**20
"""Ours hold nothing; a file that is larger, or unpacks to more, is not read."""


class _Guard(pickle.Unpickler):
    """Reads as torch and Megatron will, but finds nothing except what is allowed."""

    def __init__(self, data: bytes, *, allowed: frozenset[str], path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed
        self._path = path

    def check(self, name: str) -> None:
        """Raise CheckpointError for a name that is not allowed."""
        if name not in self._allowed:
            raise CheckpointError(f"{self._path} would run {name[:_MAX_SHOWN]!r} when read; do not use this checkpoint")

    def find_class(self, module_name: str, global_name: str) -> Any:
        self.check(f"{module_name}.{global_name}")
        return super().find_class(module_name, global_name)


class _Rehearsal(pickle._Unpickler):
    """The same in Python, slow: it tells what a BUILD sets attributes of, and takes no memory for what a file claims.

    A class or a function whose attributes were set would stay so for whoever uses it next.
    """

    stack: list[Any]
    memo: dict[int, Any]

    def __init__(self, file: io.BytesIO, guard: _Guard) -> None:
        super().__init__(file)
        self._guard = guard

    def find_class(self, module_name: str, global_name: str) -> Any:
        self._guard.check(f"{module_name}.{global_name}")
        return super().find_class(module_name, global_name)

    def load_build(self) -> None:
        target = self.stack[-2]
        if isinstance(target, type) or not dataclasses.is_dataclass(target):
            raise ValueError(f"it sets attributes of a {type(target).__name__}")
        super().load_build()  # type: ignore[misc]

    def refuse(self) -> None:
        raise ValueError("it holds what no index needs")

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: refuse,  # made in its claimed size before it is read
        **dict.fromkeys((pickle.EXT1[0], pickle.EXT2[0], pickle.EXT4[0]), refuse),  # found without find_class
    }


def read_index(path: Path) -> Metadata:
    """``.metadata``: which tensors a checkpoint holds, in which chunks, and where in its files they lie.

    Raises CheckpointError naming the first global that has no place in an index, or for a damaged file.
    """
    index = _read(path.read_bytes(), _INDEX_GLOBALS, path)
    if not isinstance(index, Metadata):
        raise CheckpointError(f"{path} holds no index of tensors but {type(index).__name__}; load another step")
    return index


def check_objects(path: Path) -> None:
    """Pass an empty ``common.pt``, or raise CheckpointError naming the first global."""
    with path.open("rb") as file:
        content = file.read(_MAX_OBJECT_BYTES + 1)
    try:
        # An archive is found at the end of any file; torch reads a file that does not begin with one as a pickle.
        if not content.startswith(_ZIP_MAGIC) or content[-_ZIP_END_BYTES:][:4] != _ZIP_END:
            raise ValueError("not a zip archive")
        archive: Any = torch._C.PyTorchFileReader(io.BytesIO(content))
        if len({name.lower() for name in archive.get_all_records()}) < len(archive.get_all_records()):
            raise ValueError("a name that comes twice")
        if (size := archive.get_record_size("data.pkl")) > _MAX_OBJECT_BYTES:
            raise ValueError(f"{size} bytes of objects")
        objects = _read(archive.get_record("data.pkl"), frozenset(), path)
        torch.load(io.BytesIO(content), weights_only=True)  # refuses programs, and other damage
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is not a file that torch.save writes; do not use this checkpoint") from error
    if type(objects) is not dict or objects:
        raise CheckpointError(f"{path} holds objects, which no checkpoint of this project does; do not use it")


def _read(data: bytes, allowed: frozenset[str], path: Path) -> Any:
    guard = _Guard(data, allowed=allowed, path=path)
    try:
        file = io.BytesIO(data)
        rehearsal = _Rehearsal(file, guard)
        rehearsal.load()
        if file.tell() != len(data):
            raise ValueError("more follows")
        # The fast one allocates its memo up to the highest index that a file asks for, which may be any.
        if (highest := max(rehearsal.memo, default=0)) > len(data):
            raise ValueError(f"memo entry {highest}")
        return guard.load()
    except CheckpointError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error!s:.{_MAX_SHOWN}}"
        raise CheckpointError(f"{path} is damaged ({found}); load another step") from error
