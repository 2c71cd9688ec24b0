"""How sequences, their extras and their labels lie in a micro-batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.batch import Batch, Extra, beside_logits, collate, label_places
from prism_megatron.engine.logprobs import places_of
from prism_megatron.engine.runtime import World
from prism_megatron.types import TokenSequence

PAD = 9
LENGTHS = (3, 8, 5)


def batch_of(lengths: Sequence[int], *, pack: bool, multiple_of: int = 4, **extras: object) -> Batch:
    """Sequences whose tokens are 100 q + t."""
    rows = [TokenSequence(tuple(range(100 * q, 100 * q + length))) for q, length in enumerate(lengths)]
    return collate(
        rows,
        pad_token_id=PAD,
        multiple_of=multiple_of,
        device=torch.device("cpu"),
        pack=pack,
        **extras,  # type: ignore[arg-type]  # keywords of collate
    )


@pytest.mark.parametrize(("pack", "slots"), [(False, (8, 8, 8)), (True, (4, 8, 8))])
def test_slots_are_the_least_multiples_that_fit(pack: bool, slots: tuple[int, ...]) -> None:
    """Claim: a sequence of exactly 8 tokens fills a slot of 8; the others are padded on the right, in their slots."""
    batch = batch_of(LENGTHS, pack=pack)
    assert batch.slots == slots
    expected = np.full((len(LENGTHS), 8), PAD)
    for q, length in enumerate(LENGTHS):
        expected[q, :length] = 100 * q + np.arange(length)
    rows = [row[:slot] for row, slot in zip(expected, slots, strict=True)]
    assert batch.input_ids_B_S.tolist() == ([np.concatenate(rows).tolist()] if pack else [row.tolist() for row in rows])
    assert batch.host_ids_B_S.tolist() == batch.input_ids_B_S.tolist()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("cp", [1, 2])
def test_values_stand_beside_the_logits_that_predict_them(world: World, pack: bool, cp: int) -> None:
    """Claim: a rank's token t has the value of t + 1 of its own sequence, and the last of a slot has 0.

    A sequence that fills its slot is followed at once by another one in a packed row.
    """
    batch = batch_of(LENGTHS, pack=pack)
    values = batch.input_ids_B_S + 1000.0
    for cp_rank in range(cp):
        rank = dataclasses.replace(world, parallel=ParallelConfig(cp=cp), cp_rank=cp_rank)
        found = beside_logits(values, batch, rank)
        tokens = batch.tokens_of(cp_size=cp, cp_rank=cp_rank)
        assert found.shape == (len(values), len(tokens))
        last = set((np.cumsum(batch.row_slots()) - 1).tolist())
        for row in range(len(values)):
            expected = [0.0 if t in last else float(values[row, t + 1]) for t in tokens.tolist()]
            assert found[row].tolist() == expected


@pytest.mark.parametrize("wrong", [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0]], ids=["short", "long"])
def test_extras_have_a_value_for_every_token(wrong: list[float]) -> None:
    whole = [[0.5] * length for length in LENGTHS]
    assert batch_of(LENGTHS, pack=True, token_extras={"x": whole}).extras["x"].sum() == 0.5 * sum(LENGTHS)
    with pytest.raises(ValueError, match=rf"extra 'x' has {len(wrong)} values for a sequence of 3 tokens"):
        batch_of(LENGTHS, pack=True, token_extras={"x": [wrong, *whole[1:]]})


def test_numbers_of_sequences_keep_their_kind() -> None:
    """Claim: whole numbers keep every bit, as dropout keys need; others are float32."""
    keys = [2**62 + 1, 2**62, 3]
    batch = batch_of(LENGTHS, pack=False, sequence_extras={"key": keys, "weight": [0.5, 1.0, 2.0]})
    assert batch.extras["key"].tolist() == keys
    assert (batch.extras["key"].dtype, batch.extras["weight"].dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("cp", [1, 2])
def test_labels_are_counted_in_host_memory(world: World, pack: bool, cp: int) -> None:
    """Claim: the host finds the places that the device would find from the mask brought to the logits."""
    rng = np.random.default_rng(3)
    mask = [rng.integers(0, 2, length).astype(float).tolist() for length in LENGTHS]
    batch = batch_of(LENGTHS, pack=pack, token_extras={Extra.LABEL_MASK: mask})
    for cp_rank in range(cp):
        rank = dataclasses.replace(world, parallel=ParallelConfig(cp=cp), cp_rank=cp_rank)
        found = label_places(batch, rank)
        assert torch.equal(found, places_of(beside_logits(batch.extras[Extra.LABEL_MASK], batch, rank)))
        assert len(found)
