"""Weights in pieces: what one call carries, and how a piece looks in the body of an HTTP request.

A piece holds at most half a bucket, so that two buckets of memory hold all there is at once: a piece under way, the
next one being filled or packed, and what the engine gathers it from (see ``GATHERED_SHARE``).
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PIECE_SHARE = 2
"""A piece is a bucket divided by this, or one larger tensor."""

GATHERED_SHARE = 8
"""An engine that feeds a hand-over gathers a bucket divided by this at a time."""

_MARK = "the tensors"
_PLACE = b"where the bytes of a storage stand, which are too many to be copied for it"
_UNFRAMED = 3
"""The last protocol of pickle without frames, whose lengths would have to count what is put in later."""
_FEW_BYTES, _MANY_BYTES = b"C", b"\x8e"  # pickle's opcodes; one and eight bytes of length follow
_CHUNK_BYTES = 2**18


@dataclass(frozen=True, eq=False)
class Piece:
    """Named tensors that travel together. ``is_last``: none comes after them."""

    tensors: tuple[tuple[str, Tensor], ...]
    is_last: bool

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors)


def pieces(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int, *, count: int | None = None) -> Iterator[Piece]:
    """Tensors in pieces of at most half of ``bucket_bytes``, or of one tensor that is larger.

    Where ``count`` says how many tensors come, the last piece does not wait for the end of ``tensors``.
    """
    limit = bucket_bytes // PIECE_SHARE
    held: list[tuple[str, Tensor]] = []
    size = 0
    for number, (name, tensor) in enumerate(tensors, start=1):
        if held and size + tensor.nbytes > limit:
            yield Piece(tuple(held), is_last=False)
            held, size = [], 0
        held.append((name, tensor))
        size += tensor.nbytes
        if number == count:
            yield Piece(tuple(held), is_last=True)
            held = []
    if held:
        yield Piece(tuple(held), is_last=True)


class _Parts:
    """A file that keeps what is written to it, and of what is large only where it lies."""

    def __init__(self) -> None:
        self.parts: list[bytes | memoryview] = []
        self.num_bytes = 0

    def write(self, part: bytes | memoryview) -> int:
        # What is large is a tensor's memory, which its owner keeps; torch reuses that of lengths and headers at once.
        self.parts.append(part if len(part) > _CHUNK_BYTES else bytes(part))
        self.num_bytes += len(part)
        return len(part)

    def flush(self) -> None:
        """Nothing is buffered."""


class Payload:
    """A piece in SGLang's ``flattened_bucket`` form: bytes of which every server gets a body of its own.

    Those of the tensors are never copied: they are read where they lie when a body is.
    """

    def __init__(self, piece: Piece) -> None:
        self._flat = flat(piece).cpu()
        stored: Any = _Parts()
        typed: Any = torch.storage.TypedStorage(
            wrap_storage=self._flat.untyped_storage(), dtype=torch.uint8, _internal=True
        )
        torch.save(typed, stored, _use_new_zipfile_serialization=False)
        # Plain pickle: SGLang's own serialiser passes file descriptors, which an unrelated process cannot open. The
        # entries of ``metadata`` need only these attributes; all indices count bytes.
        frame = io.BytesIO()
        pickler = pickle.Pickler(frame, protocol=_UNFRAMED)
        pickler.dispatch_table = {torch.storage.TypedStorage: lambda _: (torch.storage._load_from_bytes, (_PLACE,))}
        pickler.dump({"metadata": metadata(piece), "flattened_tensor": self._flat})
        head, tail = frame.getvalue().split(_FEW_BYTES + bytes([len(_PLACE)]) + _PLACE)
        self._parts = [head, _MANY_BYTES + struct.pack("<Q", stored.num_bytes), *stored.parts, tail]
        self.num_bytes = sum(map(len, self._parts))

    def body(self, fields: Mapping[str, Any]) -> tuple[Iterator[bytes], int]:
        """A JSON object of ``fields`` and the tensors, in chunks, and its length. Encoded as it is read."""
        document = {**fields, "load_format": "flattened_bucket", "serialized_named_tensors": [_MARK]}
        head, tail = json.dumps(document).encode().split(_MARK.encode())
        return self._chunks(head, tail), len(head) + -(-self.num_bytes // 3) * 4 + len(tail)

    def _chunks(self, head: bytes, tail: bytes) -> Iterator[bytes]:
        yield head
        carried = b""
        for part in self._parts:
            view = memoryview(part)
            for first in range(0, len(view), _CHUNK_BYTES):
                chunk = carried + view[first : first + _CHUNK_BYTES]
                whole = len(chunk) // 3 * 3  # base64 pads any other length, and may do so at the end alone
                carried = chunk[whole:]
                yield base64.b64encode(chunk[:whole])
        yield base64.b64encode(carried)
        yield tail


def flat(piece: Piece) -> Tensor:
    """All bytes of a piece one after another, ``[bytes]``."""
    raw = [tensor.detach().contiguous().flatten().view(torch.uint8) for _, tensor in piece.tensors]
    alone = len(raw) == 1 and raw[0].untyped_storage().nbytes() == raw[0].nbytes  # pickle takes the whole storage
    return raw[0] if alone else torch.cat(raw)


def metadata(piece: Piece) -> list[SimpleNamespace]:
    """Where each tensor lies in the bytes of ``flat``, as SGLang's ``flattened_bucket`` has it."""
    entries, start = [], 0
    for name, tensor in piece.tensors:
        end = start + tensor.nbytes
        entries.append(
            SimpleNamespace(
                name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=end, numel=end - start
            )
        )
        start = end
    return entries
