"""Damaged images and lines: read, or one error that names the file; a sample of ``python -m tests.fuzz``.

Blind spot: what a decoder makes of damaged pixels that it accepts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from prism_megatron.data.pictures.files import PROGRAMS
from prism_megatron.errors import DataError
from tests.conftest import SEED
from tests.fuzz import images, lines
from tests.fuzz.harness import Case, Kind, fuzz

CASES = {images.KIND: 400, lines.RECORDS: 50, lines.PAIRS: 50}

FLOATS_TO_255 = {name for name in images.seeds() if name.startswith("SPIDER") and name != "SPIDER F "}


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.name)
def test_damaged_input_is_read_or_refused_by_name(kind: Kind, tmp_path: Path) -> None:
    outcome = fuzz(kind, CASES[kind], seed=SEED, folder=tmp_path)
    assert not outcome.failures, "\n".join(outcome.failures[:10])
    assert outcome.read and outcome.refused, "damage both ways: some that matters, some that does not"
    assert outcome.read + outcome.refused.total() == CASES[kind]
    assert outcome.rss_last_mib < outcome.rss_first_mib + 200


def test_whole_files_of_all_formats_are_read(tmp_path: Path) -> None:
    """Claim: but for formats that other programs draw, and floats without a known white (SPIDER's of 0 to 255)."""
    assert len({name.split()[0] for name in images.seeds()}) >= 30
    for name, data in images.seeds().items():
        path = tmp_path / "whole.bin"
        path.write_bytes(data)
        if name.split()[0] in PROGRAMS:
            with pytest.raises(DataError, match="a program of its own"):
                images.read(path)
        elif name in FLOATS_TO_255:
            with pytest.raises(DataError, match="its floats go from 0 to"):
                images.read(path)
        else:
            images.read(path)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (DataError("some/file.bin: bad"), "does not name the file"),
        (DataError("PATH: bad\nindeed"), "has several lines"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (DataError("PATH: bad"), "refused: "),
        (DataError("PATH: bad"), None),
        (None, None),
    ],
)
def test_the_harness_knows_a_failure(error: Exception | None, failure: str | None, tmp_path: Path) -> None:
    def read(path: Path) -> None:
        if error is not None:
            raise type(error)(str(error).replace("PATH", str(path)))

    must_be_read = failure == "refused: "
    kind = Kind("test", "x.bin", lambda _rng: Case("made", b"", must_be_read=must_be_read), read)
    outcome = fuzz(kind, 2, seed=0, folder=tmp_path)
    assert len(outcome.failures) == (0 if failure is None else 2)
    assert failure is None or all(failure in text for text in outcome.failures)
