"""The files of a curation: a line for every problem that a step has looked at, whole or not there.

A line holds the problem, whether the step kept it, why not, and what every step so far has found out about it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from prism_megatron.config.tools.curate import STEPS, Step
from prism_megatron.data.records import Record, lettered
from prism_megatron.disk import writing
from prism_megatron.errors import DataError

_KEPT = b'{"kept": true,'


@dataclass(frozen=True)
class Problem:
    """A question about an image, and its right answer.

    Example: ``Problem(0, "7", "DATA", 1, "/DATA/images/7.png", "9f…", "How many?", None, "2", "integer", "own")``.
    """

    position: int
    """in all data folders together, from 0"""
    id: str
    """its own, and in a pool of several folders ``@`` and the folder's name"""
    folder: str
    line: int
    """in the folder's data.jsonl, from 1"""
    image: str
    picture: str
    """hash of the image file's content"""
    question: str
    choices: tuple[str, ...] | None
    answer: str
    answer_type: str
    source: str
    difficulty: str | None = None

    @property
    def image_path(self) -> Path:
        return Path(self.image)

    @property
    def asked(self) -> str:
        """The question as it is asked, choices as lettered lines."""
        return lettered(self.question, self.choices)

    @classmethod
    def of(cls, record: Record, *, position: int, id: str, picture: str) -> Problem:  # noqa: A002  # the field's name
        """The problem of a record that was read from a file."""
        file, _, line = record.where.rpartition(":")
        assert record.answer_type is not None
        return cls(
            position=position,
            id=id,
            folder=str(Path(file).parent),
            line=int(line),
            image=str(record.image),
            picture=picture,
            question=record.question,
            choices=record.choices,
            answer=record.answer,
            answer_type=record.answer_type,
            source=record.source,
            difficulty=record.difficulty,
        )


@dataclass(frozen=True)
class Row:
    """What a step came to for one problem. ``found`` is by step, and plain."""

    problem: Problem
    kept: bool = True
    reason: str = ""
    """why it was not kept, out of few"""
    detail: str = ""
    """which of them exactly"""
    found: Mapping[str, Any] = field(default_factory=dict)

    def fallen(self, reason: str, detail: str = "") -> Row:
        """The same, not kept."""
        return replace(self, kept=False, reason=reason, detail=detail)

    def having(self, step: Step, found: Mapping[str, Any]) -> Row:
        """The same, with what that step has found out."""
        return replace(self, found={**self.found, step: dict(found)})

    def line(self) -> bytes:
        """As it stands in a file, the line's end included; ASCII, so that any text survives it."""
        values = {
            "kept": self.kept,
            "reason": self.reason,
            "detail": self.detail,
            "problem": asdict(self.problem),
            "found": self.found,
        }
        return json.dumps(values).encode("ascii") + b"\n"


def path_of(folder: Path, step: Step) -> Path:
    """``1-deduplicate.jsonl`` and so on."""
    return folder / f"{STEPS.index(step) + 1}-{step}.jsonl"


def rows_of(path: Path, *, kept_only: bool = False) -> Iterator[Row]:
    """All rows of a step's file, in order. Raises DataError for a damaged one."""
    with path.open("rb") as file:
        for line in file:
            if not kept_only or line.startswith(_KEPT):
                yield row_of(line, path)


def row_of(line: bytes, path: Path) -> Row:
    """One line; ``path`` is for the DataError that a damaged one raises."""
    try:
        values = json.loads(line)
        about = values.pop("problem")
        choices: Sequence[str] | None = about.pop("choices")
        return Row(problem=Problem(choices=None if choices is None else tuple(choices), **about), **values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it, and the same command makes it anew") from error


def num_kept(path: Path) -> int:
    """Rows that a step kept."""
    with path.open("rb") as file:
        return sum(line.startswith(_KEPT) for line in file)


@contextmanager
def written_aside(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name once the block has ended and all of it is on the disk. Raises DiskError."""
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        file = part.open("wb")
    try:
        with file:
            yield file
            with writing(path):
                file.flush()
                os.fsync(file.fileno())
        with writing(path):
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_rows(file: IO[bytes], rows: Iterator[Row], path: Path) -> None:
    """Write all of them. Raises DiskError, naming ``path``, and what ``rows`` raises."""
    for row in rows:
        line = row.line()
        with writing(path):
            file.write(line)
