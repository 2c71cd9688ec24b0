"""The pickled parts of a checkpoint, read by an unpickler that runs nothing: unpickling calls whatever the file names.

torch and Megatron read a ``torch_dist`` checkpoint's index (``.metadata``) with plain ``pickle``. Everything here reads
it with one that resolves nothing but the classes such an index is made of, and before Megatron may read it too.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

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


_ZIP_MAGIC = b"PK\x03\x04"
_MAX_OBJECT_BYTES = 2**20
"""Ours hold nothing; a file that unpacks to more is not read."""


_MEMO_WRITES = ("PUT", "BINPUT", "LONG_BINPUT")


class _Guard(pickle.Unpickler):
    def __init__(self, data: bytes, *, allowed: frozenset[str], path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed
        self._path = path

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}"
        if name not in self._allowed:
            raise CheckpointError(f"{self._path} would run {name!r} when read; do not use this checkpoint")
        return super().find_class(module_name, global_name)


def read_index(path: Path) -> Metadata:
    """``.metadata``: which tensors a checkpoint holds, in which chunks, and where in its files they lie.

    Raises CheckpointError naming the first global that has no place in an index, or for a damaged file.
    """
    index = _read(path.read_bytes(), _INDEX_GLOBALS, path)
    if not isinstance(index, Metadata):
        raise CheckpointError(f"{path} holds no index of tensors but {type(index).__name__}; load another step")
    return index


def check_objects(path: Path) -> None:
    """Pass a ``common.pt`` made of plain containers and numbers, or raise CheckpointError naming the first global."""
    try:
        # zipfile finds an archive at the end of any file; torch reads a file that does not begin with one as a pickle.
        with path.open("rb") as file:
            if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
                raise ValueError("not a zip archive")
        with zipfile.ZipFile(path) as archive:
            (entry,) = (item for item in archive.infolist() if item.filename.endswith("/data.pkl"))
            if entry.file_size > _MAX_OBJECT_BYTES:
                raise ValueError(f"{entry.file_size} bytes of objects")
            data = archive.read(entry)
    except (zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(f"{path} is not a file that torch.save writes; do not use this checkpoint") from error
    _read(data, frozenset(), path)


def _read(data: bytes, allowed: frozenset[str], path: Path) -> Any:
    try:
        # Unpicklers allocate their memo up to the highest index that a file asks for, which may be any.
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _MEMO_WRITES and isinstance(argument, int) and argument > len(data):
                raise ValueError(f"memo entry {argument}")
        return _Guard(data, allowed=allowed, path=path).load()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); load another step") from error
