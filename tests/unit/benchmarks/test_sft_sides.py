"""Who takes part in ``benchmarks/sft.py``, whose losses must be ours, and what our side makes of a step's rows."""

from __future__ import annotations

import pytest

from benchmarks.sft import OURS, sides_of
from benchmarks.sft_sides.ours_side import rows_of
from benchmarks.sft_sides.packing import Measured
from prism_megatron.stages.sft.demonstrations import Row
from prism_megatron.types import TokenSequence


@pytest.mark.parametrize(("precision", "kinds"), [("fp32", {"fp32"}), ("bf16", {"bf16", "autocast", "masters"})])
def test_every_kind_of_a_precision_takes_part(precision: str, kinds: set[str]) -> None:
    sides, plain, trl, _ = sides_of(precision)
    names = [side.name for side in sides]
    assert len(set(names)) == len(names)
    assert names[0] == OURS
    assert {side.dtype for side in sides} == kinds
    assert set(names) == {side.name for side in sides if side.is_ours} | set(plain) | set(trl)


def test_losses_must_be_ours_where_the_rounding_is() -> None:
    """Claim: all of fp32; of bf16 the plain loop with fp32 masters alone."""
    sides, _, _, same = sides_of("fp32")
    assert same == [side.name for side in sides]
    assert sides_of("bf16")[3] == ["ours, packed", "ours, padded", "plain, masters, fused"]


def test_packed_rows_are_one_with_the_same_records_in_order() -> None:
    rows = tuple(Row(((TokenSequence((n, n + 1)), [0.0, 1.0]),), (n,)) for n in range(3))
    (packed,) = rows_of(rows, pack=True)
    assert [sequence.token_ids for sequence, _ in packed.demonstrations] == [(0, 1), (1, 2), (2, 3)]
    assert packed.sources == (0, 1, 2)
    assert rows_of(rows, pack=False) == rows


def test_the_ratio_is_the_median_over_steps() -> None:
    """Claim: a step of which one half was disturbed does not decide."""
    assert Measured(1.0, [1.0, 2.0, 1.0], [2.0, 5.0, 90.0], 2.0, 0.0).ratio == 2.5
