"""Visual rows point at the right features, and payloads unpack to what was packed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_providers.qwen3_vl.deepstack import VisualRows, locate, pack, pending_taps, unpack
from prism_megatron.errors import DataError
from prism_megatron.parity.samples import IMAGE
from prism_megatron.parity.tiny import tiny_config
from tests.parity.tiny_batches import shape_of, tiny_batch

SHAPE = shape_of(tiny_config())


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 4),
    rows=st.integers(1, 3),
    visual=st.integers(0, 5),
    num_taps=st.integers(0, 3),
    next_layer=st.integers(0, 4),
)
def test_unpack_undoes_pack(tokens: int, rows: int, visual: int, num_taps: int, next_layer: int) -> None:
    """Claim: exact for any sizes, with gradients; a payload is never a view, and carries no consumed tap."""
    pending = pending_taps(num_taps, next_layer)
    assert list(pending) == [k for k in range(num_taps) if k >= next_layer]
    hidden = torch.randn(tokens, rows, 3, requires_grad=True)
    taps = {k: torch.randn(visual, 3, requires_grad=True) for k in pending}
    payload = pack(hidden, list(taps.values()))
    assert payload._base is None
    assert len(payload) == tokens + -(-len(pending) * visual // rows)
    again, again_taps = unpack(payload, num_tokens=tokens, num_visual=visual, pending=pending)
    assert torch.equal(again, hidden)
    assert again_taps.keys() == taps.keys()
    (again.sum() + sum(2 * tap.sum() for tap in again_taps.values())).backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.ones_like(hidden))
    for k, tap in taps.items():
        assert torch.equal(again_taps[k], tap)
        assert tap.grad is not None
        assert torch.equal(tap.grad, 2 * torch.ones_like(tap))


@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("case", ["images", "shared", "text", "video"])
def test_ranks_share_the_visual_rows(case: str, pack: bool, cp_size: int) -> None:
    """Claim: over context- and sequence-parallel ranks each visual row stands once, beside its own token."""
    batch = tiny_batch(case, multiple_of=8, pack=pack)
    visual, _ = locate(batch, SHAPE)
    found: list[tuple[int, int, int]] = []
    for cp_rank in range(cp_size):
        held = batch.tokens_of(cp_size=cp_size, cp_rank=cp_rank)
        for tokens in np.split(held, 2):
            part = visual.of(tokens)
            assert sorted(zip(part.token_V, part.row_V, strict=True)) == list(
                zip(part.token_V, part.row_V, strict=True)
            ), "every stage must see the same order"
            found += zip(tokens[part.token_V].tolist(), part.row_V.tolist(), part.feature_V.tolist(), strict=True)
    assert sorted(found) == sorted(zip(*(index.tolist() for index in visual), strict=True))


def test_rows_that_share_an_image_share_its_features() -> None:
    """Claim: in the ``shared`` case the wide image (features 0…7) stands in all three rows, the small one in one."""
    visual, _ = locate(tiny_batch("shared"), SHAPE)
    by_row = [visual.feature_V[visual.row_V == b].tolist() for b in range(3)]
    assert by_row == [list(range(8)), list(range(8)), [8, 9, 10, 11, *range(8)]]


def test_a_batch_that_contradicts_its_images_is_refused() -> None:
    batch = tiny_batch("images")
    ids = batch.host_ids_B_S.copy()
    ids[1, 0] = IMAGE
    with pytest.raises(DataError, match="1 image tokens"):
        locate(dataclasses.replace(batch, host_ids_B_S=ids), SHAPE)
    with pytest.raises(DataError, match="names 2 sequences of 3"):
        locate(dataclasses.replace(batch, images_by_sequence=batch.images_by_sequence[:2]), SHAPE)


def test_padding_that_looks_like_an_image_is_not_one() -> None:
    batch = tiny_batch("images")
    ids = batch.host_ids_B_S.copy()
    for b, length in enumerate(batch.lengths_Q.tolist()):
        ids[b, length:] = IMAGE
    visual, _ = locate(dataclasses.replace(batch, host_ids_B_S=ids), SHAPE)
    assert len(visual.token_V) == len(locate(batch, SHAPE)[0].token_V)


def test_add_returns_a_new_tensor() -> None:
    """Claim: the sum stands at the visual positions only, and is no view (the schedule frees what a stage sends)."""
    visual = VisualRows(torch.tensor([0, 2]), torch.tensor([1, 0]), torch.tensor([0, 1]))
    hidden = torch.zeros(3, 2, 1)
    added = visual.add(hidden, torch.tensor([[1.0], [2.0]]))
    assert added.flatten().tolist() == [0, 1, 0, 0, 2, 0]
    assert hidden.abs().sum() == 0
    assert added._base is None
