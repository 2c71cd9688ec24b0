"""Sequences that go on from another, and images that micro-batches share (blind spot: attention; see tests/parity)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model_providers.qwen3_vl.deepstack import locate
from prism_megatron.engine.batch import Batch, collate
from prism_megatron.engine.vision.images import SharedImages
from prism_megatron.parity.samples import PAD, image, row
from prism_megatron.types import TokenSequence
from tests.parity.discriminator_oracle import tiny_shape


def packed(sequences: list[TokenSequence], prefixes: list[int | None]) -> Batch:
    return collate(sequences, pad_token_id=PAD, multiple_of=4, device=torch.device("cpu"), pack=True, prefixes=prefixes)


def test_positions_go_on_from_the_prefix() -> None:
    """Tokens behind a shared prompt have the positions of the whole sequences; the prompt's padding counts nowhere."""
    rng = np.random.default_rng(3)
    prompt = row(rng, 3, image(rng, (1, 4, 8)), 5)
    endings = [tuple(range(10, 10 + length)) for length in (1, 6)]
    shared = packed([prompt, *(TokenSequence(ending) for ending in endings)], [None, 0, 0])
    places, positions = locate(shared, tiny_shape())
    length = len(prompt.token_ids)
    assert shared.row_prefixes() == ((0, 0), (0, length), (0, length))
    for ending, (_, start) in zip(endings, shared.places()[1:], strict=True):
        whole = packed([TokenSequence((*prompt.token_ids, *ending), prompt.images)], [None])
        _, expected = locate(whole, tiny_shape())
        ours = positions[:, 0, start : start + len(ending)]
        assert np.array_equal(ours, expected[:, 0, length : length + len(ending)])
    assert len(places.token_V) == 8  # the image's tokens once


@pytest.mark.parametrize(
    "prefixes", [[0, None], [1, None], [None, 0, 1]], ids=["itself", "a later one", "a prefix's prefix"]
)
def test_a_prefix_is_an_earlier_sequence_by_itself(prefixes: list[int | None]) -> None:
    with pytest.raises(ValueError, match="which is not an earlier one by itself"):
        packed([TokenSequence((5, 6))] * len(prefixes), prefixes)


def test_shared_images_are_let_go_after_their_last_micro_batch() -> None:
    """Two micro-batches show one image and the second another: it is kept between them, and nothing at the end."""
    rng = np.random.default_rng(3)
    first, second = image(rng, (1, 4, 4)), image(rng, (1, 4, 4))
    shared = SharedImages([(first,), (first, second)])
    features = (torch.ones(1),)
    held = []
    for shown in ((first,), (first, second)):
        for missing in shared.missing(shown, torch.device("cpu")):
            shared.keep(missing, features)
        assert [shared.take(one) for one in shown] == [features] * len(shown)
        held.append(len(shared))
    assert held == [1, 0]
