"""Attention inside sequences and their prefixes against plain loops (``tests/distributed`` has context parallelism)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from prism_megatron.engine.layers import sdpa
from prism_megatron.engine.layers.attention import SDPACoreAttention, Sequences

HEADS, KV_HEADS, SIZE = 4, 2, 8


def plain(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float) -> Tensor:
    """Token by token, head by head, in the dtype of the tensors."""
    out, start = torch.zeros(*query.shape[:2], HEADS, SIZE, dtype=query.dtype), 0
    for slot, (first, length) in zip(sequences.slots, sequences.prefixes, strict=True):
        for token in range(start, start + slot):
            seen = [*range(first, first + length), *range(start, token + 1)]
            for head in range(HEADS):
                group = head * KV_HEADS // HEADS
                for row in range(query.shape[1]):
                    scores = key[seen, row, group] @ query[token, row, head] * scale
                    out[token, row, head] = scores.softmax(0) @ value[seen, row, group]
        start += slot
    return out.flatten(2)


def test_runs_end_where_length_or_prefix_changes() -> None:
    """Claim: neighbours are taken together only if both are equal."""
    sequences = Sequences((4, 4, 4, 8, 8), ((0, 0), (0, 4), (0, 4), (0, 4), (4, 3)))
    assert list(sequences.runs()) == [
        (4, 1, slice(0, 0)),
        (4, 2, slice(0, 4)),
        (8, 1, slice(0, 4)),
        (8, 1, slice(4, 7)),
    ]
    assert list(Sequences((4, 4, 8)).runs()) == [(4, 2, slice(0, 0)), (8, 1, slice(0, 0))]


def test_long_sequences_are_squares_where_most_of_the_keys_are_their_own() -> None:
    query, key = torch.empty(1, 1, 4500, 4, device="cpu"), torch.empty(1, 1, 6000, 4)
    assert sdpa.is_square_cheaper(query, key)
    assert not sdpa.is_square_cheaper(query[:, :, :400], key[:, :, :1900]), "most of a square would be the prompt's"
    assert not sdpa.is_square_cheaper(key, key), "it is one"
    assert not sdpa.is_square_cheaper(query[:, :, :700], key[:, :, :1000])
    assert not sdpa.is_square_cheaper(query.to("meta"), key.to("meta")), "CUDA's kernels leave out what is masked"


@pytest.mark.parametrize("long", [sdpa.LONG, 1])
@pytest.mark.parametrize("scale", [None, 0.9])
def test_attention_is_plain_attention_over_prefix_and_sequence(
    scale: float | None, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: to 1e-12 in float64, for grouped heads, two rows, and prefixes shorter than their slots; masked, and as
    squares where they are cheaper.
    """
    monkeypatch.setattr(sdpa, "LONG", long)
    sequences = Sequences((6, 4, 4, 3), ((0, 0), (0, 3), (0, 5), (0, 0)))
    query = torch.randn(17, 2, HEADS, SIZE, dtype=torch.float64)
    key, value = torch.randn(2, 17, 2, KV_HEADS, SIZE, dtype=torch.float64)
    core = SDPACoreAttention(
        config=SimpleNamespace(attention_dropout=0.0, context_parallel_size=1),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        softmax_scale=scale,
    )
    expected = plain(query, key, value, sequences, scale or 1 / math.sqrt(SIZE))
    torch.testing.assert_close(core(query, key, value, sequences), expected, rtol=0, atol=1e-12)
