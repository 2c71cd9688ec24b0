"""A recipe over a pool, and stores with callers over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.tools.curate import Recipe, Strong
from tests.unit.curation.asking import Opened
from tests.unit.curation.fakes import TEACHER, model, record, write_pool

STRONG = (Strong(model("big"), samples=2),)
CHOICES: dict[str, Any] = {"answer": "B", "answer_type": "choice", "choices": ["two", "three"]}


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    all_of_a_test = Opened(tmp_path)
    yield all_of_a_test
    all_of_a_test.close()


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    records = [record(f"p{number}", str(number), difficulty="hard" if number % 2 else None) for number in range(12)]
    for one in records:
        if one["difficulty"] is None:
            del one["difficulty"]
    pool = write_pool(tmp_path / "pool", [*records, record("chosen", **CHOICES), record("q", image="images/p0.png")])
    return Recipe(data=(pool,), teacher=TEACHER, strong=STRONG, best=4)
