"""Damaged records and shards: each is read, skipped with a count, or one named error; never anything else.

A sample of ``python -m tests.fuzz --sets 10000``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from prism_megatron.data.formats.files.walk import walk
from prism_megatron.errors import DataError
from tests.conftest import SEED
from tests.fuzz import sets
from tests.fuzz.sets import FORMATS, fuzz_sets

CASES = 37


@pytest.mark.parametrize("name", FORMATS)
def test_damage_is_read_skipped_or_one_named_error(name: str, tmp_path: Path) -> None:
    """Blind spot: damage beyond the seeds that are tried."""
    tally = fuzz_sets(name, CASES, seed=SEED, folder=tmp_path)
    assert not tally.failures, "\n".join(tally.failures[:5])
    assert tally.sets == CASES
    assert tally.outcomes["read"] and tally.outcomes["record"], f"blind: {tally.text}"


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (DataError("bad"), "the error does not name"),
        (None, None),
    ],
)
def test_the_harness_knows_a_failure(
    error: Exception | None, failure: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def walked(corpus: object) -> object:
        if isinstance(error, DataError):
            return iter([("where", error)])
        if error is not None:
            raise error
        return walk(corpus)  # type: ignore[arg-type]

    monkeypatch.setattr(sets, "walk", walked)
    tally = fuzz_sets("ours", 2, seed=0, folder=tmp_path)
    assert len(tally.failures) == (0 if failure is None else 2)
    assert failure is None or all(failure in text for text in tally.failures)
