"""Stores and callers over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.curation.asking import Opened


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    all_of_a_test = Opened(tmp_path)
    yield all_of_a_test
    all_of_a_test.close()
