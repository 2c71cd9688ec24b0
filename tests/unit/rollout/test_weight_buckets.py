"""What a piece looks like on its way to a server. Blind spot: SGLang's own reader, which ``tests/sglang`` asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prism_megatron.rollout.weight_buckets import Payload, Piece, pieces
from tests.unit.rollout.fake_sglang import unpack

LARGE = 200_000
"""Elements of a tensor that is many chunks long."""


def kilobytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    "tensors",
    [
        {"one": random(LARGE)},
        {"one": random(3, 5), "two": random(LARGE, dtype=torch.bfloat16), "three": random(7, dtype=torch.bfloat16)},
        {"view": random(LARGE, 2)[:, 1], "transposed": random(2, 3).T},
        {"tiny": random(1, dtype=torch.bfloat16)},
        {"slice": random(LARGE)[7:19]},
    ],
    ids=["alone", "several", "not contiguous", "tiny", "slice"],
)
def test_a_body_is_read_back_as_it_was(tensors: dict[str, Tensor]) -> None:
    """Oracle: pickle's and torch's own readers. Exact; the announced length too, which HTTP is given beforehand."""
    payload = Payload(Piece(tuple(tensors.items()), is_last=True))
    for _ in range(2):  # one for each server
        chunks, length = payload.body({"weight_version": "7"})
        body = b"".join(chunks)
        assert len(body) == length <= 1.4 * sum(tensor.nbytes for tensor in tensors.values()) + 2000
        document = json.loads(body)
        assert document["weight_version"] == "7" and document["load_format"] == "flattened_bucket"
        (serialised,) = document["serialized_named_tensors"]
        read = unpack(serialised)
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_a_piece_is_half_a_bucket_filled_exactly_or_one_larger_tensor() -> None:
    """Tensors of 40, 60, 30, 30, 41, 101 and 1 bytes, and buckets of 200."""
    sizes = (40, 60, 30, 30, 41, 101, 1)
    tensors = [(f"{i}", torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    expected = [(40, 60), (30, 30), (41,), (101,), (1,)]
    for count in (None, len(sizes)):
        found = list(pieces(iter(tensors), 200, count=count))
        assert [tuple(tensor.nbytes for _, tensor in piece.tensors) for piece in found] == expected
        assert [piece.is_last for piece in found] == [False] * 4 + [True]
        assert [name for piece in found for name, _ in piece.tensors] == [name for name, _ in tensors]


def test_the_last_piece_of_a_known_number_does_not_wait_for_the_end() -> None:
    """Claim: it is given before the source is asked for more, which in a hand-over is a collective of all ranks."""

    def source() -> Iterator[tuple[str, Tensor]]:
        yield from (("a", torch.zeros(2)), ("b", torch.zeros(2)))
        raise AssertionError("asked for more")

    assert next(pieces(source(), 1000, count=2)).is_last


def test_a_large_tensor_is_sent_from_where_it_lies() -> None:
    """Claim: neither packing nor reading a body takes memory in the size of the tensor. 256 MB, a tenth allowed."""
    tensor = torch.ones(64 * 2**20)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = kilobytes("VmRSS")
    chunks, length = Payload(Piece((("one", tensor),), is_last=True)).body({})
    assert sum(map(len, chunks)) == length > tensor.nbytes * 4 / 3
    assert 1024 * (kilobytes("VmHWM") - before) < tensor.nbytes / 10
