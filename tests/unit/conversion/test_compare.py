"""Two sets of tensors, compared in parts: what differs, by how much, and the hash of the whole on either side."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from prism_megatron.conversion import compare as module
from prism_megatron.conversion.compare import TensorComparison, compare
from tests.unit.conversion.held import Held


def hash_of(tensor: Tensor) -> str:
    """Oracle: hashlib over the text and all bytes at once."""
    text = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(text.encode() + raw, digest_size=32).hexdigest()


def compared(one: Tensor, other: Tensor) -> TensorComparison:
    """Of the two, and of each with itself."""
    counted: list[int] = []
    (found,) = compare(Held({"x": one}), Held({"x": other}), counted.append)
    assert sum(counted) == one.nbytes
    assert (found.hash_a, found.hash_b) == (hash_of(one), hash_of(other))
    for same in (one, other):
        (alone,) = compare(Held({"x": same}), Held({"x": same.clone()}), lambda _: None)
        assert alone.equal
        assert (alone.hash_a, alone.num_different, alone.max_difference) == (hash_of(same), 0, 0.0)
    return found


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 100])
def test_parts_add_up(monkeypatch: pytest.MonkeyPatch, rows_at_a_time: int) -> None:
    """Claim: elements are counted once, whatever of their bytes differ; the largest difference is the whole tensor's,
    and no number where one of its parts has none; hashes are those of the whole, on both sides."""
    torch.manual_seed(0)
    one = torch.randn(5, 3)
    monkeypatch.setattr(module, "CHUNK_BYTES", rows_at_a_time * 12)
    other = one.clone()
    other[1, 2] += 2.0
    other[3, 0] -= 0.5
    other[3, 1] = -other[3, 1]
    largest = float((one.double() - other.double()).abs().max())
    found = compared(one, other)
    assert found.num_different == 3
    assert found.max_difference == pytest.approx(largest)
    other[0, 0] = torch.nan
    found = compared(one, other)
    assert found.num_different == 4
    assert found.max_difference != found.max_difference
    assert not found.equal


def test_tensors_of_other_shapes_or_formats_are_different() -> None:
    """Claim: also where their bytes are the same."""
    zeros = torch.zeros(4)
    for other in (zeros.view(2, 2), zeros.view(torch.int32), torch.zeros(8).bfloat16()):
        found = compared(zeros, other)
        assert not found.equal
        assert (found.num_different, found.max_difference) == (None, None)


def test_single_numbers_and_nothing_are_compared() -> None:
    found = compared(torch.tensor(1.5), torch.tensor(-1.0))
    assert (found.num_different, found.max_difference) == (1, 2.5)
    (found,) = compare(Held({"x": torch.zeros(0, 3)}), Held({"x": torch.zeros(0, 3)}), lambda _: None)
    assert found.equal


def test_common_names_come_in_their_order() -> None:
    one, other = (Held(dict.fromkeys(names, torch.zeros(1))) for names in ("cab", "bdc"))
    assert [found.name for found in compare(one, other, lambda _: None)] == ["b", "c"]
