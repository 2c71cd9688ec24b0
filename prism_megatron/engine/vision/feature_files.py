"""Features of images on disk, by a key: at most so many bytes, for any number of processes and runs at a time.

A file is written aside and renamed, so a reader meets a whole file or none. It holds the checksum of its key and its
bytes; one that does not fit, or cannot be read, counts as missing. That is why nothing is flushed to the disk: what a
crash leaves half written is a miss. What was used longest ago is removed first.
"""

from __future__ import annotations

import os
import secrets
import time
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from prism_megatron.disk import disk_error, writing

SUFFIX = ".safetensors"
NUM_SHELVES = 64
"""Folders that share the room: whoever makes room looks through one of them only."""
_FULL, _TRIMMED = 0.875, 0.75
"""Shares of a shelf's room: above the first it is trimmed, to the second."""
_ABANDONED_S = 3600.0
_MOST_FAILURES = 3
"""In a row: a network's folder may fail once, and be there again."""


class FeatureFiles:
    """A folder of tensors. Every process that reads or writes there has one of these."""

    def __init__(self, folder: Path, *, max_bytes: int, writers: int = 1, num_shelves: int = NUM_SHELVES) -> None:
        """``writers`` processes of this run write at a time. Raises DiskError for a folder that cannot be written to.

        Each looks at what is there before the others and it could have filled it, so that the bound holds for all of
        them together; other runs in the same folder may exceed it by an eighth each, until the next look.
        """
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{secrets.token_hex(8)}.part"
            probe.touch()
            probe.unlink(missing_ok=True)
        self.folder = folder
        self._shelf_bytes, self._writers, self._num_shelves = max_bytes // num_shelves, writers, num_shelves
        self._left: dict[Path, int] = {}
        self._failures = 0
        self.failure: str | None = None
        """why nothing is written any more; None where all is well"""

    def path_of(self, key: str) -> Path:
        """Where the features of a key (hexadecimal) lie, if they are there."""
        return self.folder / f"{int(key[:8], 16) % self._num_shelves:02d}" / f"{key}{SUFFIX}"

    def find(self, key: str) -> Tensor | None:
        """What was kept under ``key``; None where nothing is, or nothing that can be trusted."""
        path = self.path_of(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None  # never there, or removed a moment ago
        found = _checked(content, key)
        with suppress(OSError):
            if found is None:
                path.unlink()
            else:
                os.utime(path)
        return found

    def keep(self, key: str, features: Tensor) -> bool:
        """Keep ``features`` (in host memory) under ``key``; False where the bound has no room for as many.

        A disk that is full, or fails several times in a row, ends the keeping.
        """
        if self.failure is not None:
            return True
        content = save({"features": features.contiguous(), "checksum": _checksum(key, features)})
        path = self.path_of(key)
        if len(content) > self._shelf_bytes * (_FULL - _TRIMMED):
            return False
        part = path.with_name(f".{key}.{secrets.token_hex(4)}.part")
        try:
            path.parent.mkdir(exist_ok=True)
            self._make_room(path.parent, len(content))
            part.write_bytes(content)
            part.replace(path)
            self._failures = 0
        except OSError as error:
            self._failures += 1
            if self._failures == _MOST_FAILURES or disk_error(error, self.folder) is not None:
                self.failure = f"{path} cannot be written: {error.strerror or error}"
            with suppress(OSError):
                part.unlink()
        return True

    def _make_room(self, shelf: Path, size: int) -> None:
        """Look at the shelf where others may have filled it since the last look, and remove the oldest if it is full.

        What is left is this writer's share of the room: all of them together cannot exceed the bound.
        """
        self._left[shelf] = self._left.get(shelf, 0) - size
        if self._left[shelf] >= 0:
            return
        held = _held(shelf)
        total = sum(length for _, length, _ in held)
        room = int(self._shelf_bytes * _FULL)
        if total + size * self._writers > room:
            for _, length, path in held:
                if total + size * self._writers <= self._shelf_bytes * _TRIMMED:
                    break
                if path.suffix == SUFFIX:  # what another writer has under way is its own
                    path.unlink(missing_ok=True)
                    total -= length
        self._left[shelf] = (room - total) // self._writers - size


def _held(shelf: Path) -> list[tuple[float, int, Path]]:
    """When each file was last used, its size and path, the oldest first. What a killed writer left aside is removed."""
    held = []
    for entry in os.scandir(shelf):
        with suppress(FileNotFoundError):
            status = entry.stat()
            if not entry.name.endswith(SUFFIX) and time.time() - status.st_mtime > _ABANDONED_S:
                Path(entry.path).unlink(missing_ok=True)
            else:
                held.append((status.st_mtime, status.st_size, Path(entry.path)))
    return sorted(held)


def _checked(content: bytes, key: str) -> Tensor | None:
    try:
        held = load(content)
        features, checksum = held["features"], held["checksum"]
    except (SafetensorError, KeyError, ValueError):
        return None
    return features if torch.equal(checksum, _checksum(key, features)) else None


def _checksum(key: str, features: Tensor) -> Tensor:
    of_key = zlib.crc32(f"{key} {features.dtype} {tuple(features.shape)}".encode())
    content = features.contiguous().reshape(-1).view(torch.uint8).numpy()
    return torch.tensor([zlib.crc32(content.data, of_key)], dtype=torch.int64)
