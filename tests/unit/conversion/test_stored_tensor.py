"""Rows are read from where they lie in a file, however many bytes a read gives at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prism_megatron.conversion.hf.stored_tensor import StoredTensor, safetensors_header, safetensors_in
from prism_megatron.errors import ConversionError


@pytest.fixture
def stored(tmp_path: Path) -> StoredTensor:
    """Numbers from 0 on, behind 10 bytes of something else and before as many."""
    path = tmp_path / "file"
    numbers = torch.arange(24, dtype=torch.int16).view(6, 4)
    path.write_bytes(b"x" * 10 + numbers.numpy().tobytes() + b"y" * 10)
    return StoredTensor(path, 10, (6, 4), torch.int16)


@pytest.mark.parametrize("most", [10**6, 7, 1])
def test_any_rows_are_read_in_any_pieces(stored: StoredTensor, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: rows come whole where the system gives ``most`` bytes at a time, as network file systems do."""
    preadv = os.preadv

    def short(handle: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(handle, [buffers[0][:most]], offset)

    monkeypatch.setattr(os, "preadv", short)
    for start, stop in ((0, 6), (2, 5), (5, 6), (3, 3)):
        assert torch.equal(stored.rows(start, stop), torch.arange(24, dtype=torch.int16).view(6, 4)[start:stop])


def test_a_file_that_ends_too_early_is_named(stored: StoredTensor) -> None:
    os.truncate(stored.path, 10 + 3 * stored.row_bytes + 1)
    assert stored.rows(0, 3).shape == (3, 4)
    with pytest.raises(ConversionError, match=rf"{stored.path} ends at byte {10 + 3 * 8 + 1}, before its tensors do"):
        stored.rows(3, 4)


def test_headers_are_those_of_safetensors(tmp_path: Path) -> None:
    """Claim: tensors are found where safetensors put them; our own headers are a multiple of 8 bytes long."""
    tensors = {"a": torch.arange(3, dtype=torch.bfloat16), "bb": torch.randn(2, 5), "c": torch.tensor(7)}
    save_file(tensors, tmp_path / "x.safetensors")
    for name, where in safetensors_in(tmp_path / "x.safetensors").items():
        assert (where.shape, where.dtype) == (tuple(tensors[name].shape), tensors[name].dtype)
        if where.shape:
            assert torch.equal(where.rows(0, where.shape[0]), tensors[name])
    for name in ("a", "ab", "abc", "abcdefgh"):
        head, begins = safetensors_header({name: (torch.uint8, (3,)), "z": (torch.uint8, (1,))})
        assert len(head) % 8 == 0
        assert begins == {name: len(head), "z": len(head) + 3}
