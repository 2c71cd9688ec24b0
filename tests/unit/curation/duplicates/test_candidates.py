"""Which pairs get a second look: by bits of hashes exactly, by bands of signatures as good as surely."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism_megatron.curation.duplicates import candidates
from prism_megatron.curation.duplicates.bands import (
    PERMUTATIONS,
    band_pairs,
    bands_of,
    number_of_bands,
    share_a_band,
    values_of_a_band,
)
from prism_megatron.curation.duplicates.candidates import near_pairs
from prism_megatron.curation.duplicates.words import overlap, shingles_of
from tests.timing import processor_seconds

HASHES = st.lists(st.integers(0, 15) | st.integers(0, 2**64 - 1), max_size=20)
BANDS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)), max_size=12)


@given(one=HASHES, other=HASHES, distance=st.integers(0, 64))
def test_pairs_of_hashes_are_those_of_a_slow_twin(one: list[int], other: list[int], distance: int) -> None:
    """Claim: exactly the pairs within the distance, each once and with its bits, whatever the tiles are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "ROWS", 3)
        patch.setattr(candidates, "COLUMNS", 5)
        found = [
            (int(row), int(column), int(bits))
            for (rows, columns), some in near_pairs(np.array(one, np.uint64), np.array(other, np.uint64), distance)
            for row, column, bits in zip(rows, columns, some, strict=True)
        ]
    wanted = [(i, j, (a ^ b).bit_count()) for i, a in enumerate(one) for j, b in enumerate(other)]
    assert sorted(found) == [one for one in wanted if one[2] <= distance]


@given(one=BANDS, other=BANDS)
def test_pairs_of_bands_are_those_of_a_slow_twin(one: list[tuple[int, ...]], other: list[tuple[int, ...]]) -> None:
    first, second = (np.array(rows, dtype=np.uint32).reshape(-1, 3) for rows in (one, other))
    rows, columns = band_pairs(first, second)
    wanted = [
        (i, j) for i, a in enumerate(one) for j, b in enumerate(other) if any(x == y for x, y in zip(a, b, strict=True))
    ]
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == wanted
    assert share_a_band(first[rows], second[columns]).all()


@given(overlap=st.floats(0.3, 1))
def test_bands_are_as_long_as_they_may_be(overlap: float) -> None:
    """Claim: a hundredth of pairs at the bound is missed at most, by the formula, and longer bands would miss more."""

    def missed(values: int) -> float:
        return float((1 - overlap**values) ** (PERMUTATIONS // values))

    values = values_of_a_band(overlap)
    assert missed(values) <= 0.01 and (values == 8 or missed(values + 1) > 0.01)
    assert number_of_bands(values) * values <= PERMUTATIONS


@pytest.mark.parametrize("bound", [0.8, 0.5])
def test_texts_that_are_much_alike_share_a_band(bound: float) -> None:
    """Claim: of 300 pairs of texts at or above the bound, counted by force, at most 3 % share none; of pairs without a
    common word none does, but by chance in 32 bits."""
    draw = random.Random(3)
    values = values_of_a_band(bound)

    def bands(words: list[str]) -> npt.NDArray[np.uint32]:
        return np.frombuffer(bands_of(shingles_of(words), values), dtype="<u4")[None]

    alike = missed = 0
    while alike < 300:
        text = [draw.choice("abcdefghijklmnop") * draw.randint(1, 6) for _ in range(draw.randint(8, 40))]
        changed = [word if draw.random() < 1 - (1 - bound) / 3 else "other" for word in text]
        if overlap(shingles_of(text), shingles_of(changed)) >= bound:
            alike += 1
            missed += not share_a_band(bands(text), bands(changed))[0]
    print(f"bound {bound}: {number_of_bands(values)} bands of {values}, {missed} of {alike} missed")
    assert missed <= 9
    strangers = [bands([f"{name}{i}" for i in range(20)]) for name in "abcdefgh"]
    assert not any(share_a_band(a, b)[0] for i, a in enumerate(strangers) for b in strangers[:i])


def test_equal_texts_have_equal_bands_in_every_process() -> None:
    """Claim: bands depend on the text alone: they are as they were when this was written, by datasketch 2.0."""
    assert bands_of(shingles_of(["how", "many", "circles"]), 64).hex() == "d581089b8caa74ab"


def test_all_pairs_of_a_large_pool_take_seconds() -> None:
    """Claim: 113,000 pictures are compared with each other in less than two minutes of one core (prints how many)."""
    hashes = np.random.default_rng(5).integers(0, 2**64, 12_000, dtype=np.uint64)
    scale = (113_000 / 12_000) ** 2 / 2
    seconds = scale * processor_seconds(
        lambda: sum(len(bits) for _, bits in near_pairs(hashes, hashes, 24)), enough=120 / scale
    )
    print(f"113,000 pictures: {seconds:.0f} s of one core")
    assert seconds < 120
