"""Reads the records of a run that W&B kept offline; the package has no reader of its own in Python any more.

The file is a log as LevelDB writes it (doc/log_format.md there) behind a header of seven bytes: blocks of 32 KiB of
records with checksum (4 bytes), length (2) and kind (1: whole, 2: first, 3: middle, 4: last part).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _RECORD_HEADER, _BLOCK = 7, 7, 32768


def records(path: Path) -> Iterator[Any]:
    """Messages of W&B's ``Record``, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    for data in _payloads(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        yield record


def _payloads(content: bytes) -> Iterator[bytes]:
    assert content.startswith(b":W&B"), "not a file of W&B"
    position, parts = _HEADER, b""
    while position + _RECORD_HEADER <= len(content):
        if _BLOCK - position % _BLOCK < _RECORD_HEADER:  # a block's rest is left empty
            position += _BLOCK - position % _BLOCK
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        position += _RECORD_HEADER
        parts += content[position : position + length]
        position += length
        if kind in (1, 4):
            yield parts
            parts = b""
