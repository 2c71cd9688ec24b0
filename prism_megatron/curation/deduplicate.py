"""The first step: problems that are others' duplicates fall, and so does what training would refuse.

It is the first because nothing has been paid for yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from prism_megatron.curation.files import Problem, Row
from prism_megatron.curation.filter import control_token
from prism_megatron.curation.pool import Pool, picture_of
from prism_megatron.data.records import Record
from prism_megatron.data.segments import parse_response, response_text

UNUSABLE = "text that training refuses"


class Verdict(Protocol):
    """What became of one problem."""

    @property
    def position(self) -> int: ...
    @property
    def kept(self) -> bool: ...
    @property
    def reason(self) -> str | None:
        """Why it is not kept."""
        ...

    @property
    def other(self) -> str:
        """What it is a duplicate of."""
        ...


Deduplicate = Callable[[Callable[[], Iterator[Record]], Callable[[], Iterator[Record]]], Iterator[Verdict]]
"""From the problems and the evaluation sets' records, each of which may be read again, to a verdict for each problem in
order."""


def deduplicated(pool: Pool, evaluation: Pool, deduplicate: Deduplicate) -> Iterator[Row]:
    """A row for every problem of the pool. Raises DataError as the pools do."""
    verdicts = deduplicate(pool.records, evaluation.records)
    for position, (record, verdict) in enumerate(zip(pool.records(), verdicts, strict=True)):
        assert verdict.position == position
        row = Row(Problem.of(record, position=position, id=pool.name_of(record), picture=picture_of(record)))
        if not verdict.kept:
            yield row.fallen(verdict.reason or "", verdict.other)
        elif (problem := unusable(record)) is not None:
            yield row.fallen(UNUSABLE, problem)
        else:
            yield row


def unusable(record: Record) -> str | None:
    """Why no demonstration of it could be trained on, however good; None where one can."""
    for text in (record.question_text, record.answer):
        if (token := control_token(text)) is not None:
            return token
    parsed = parse_response(response_text("caption", "reasoning", record.answer).encode("utf-8"))
    return parsed if isinstance(parsed, str) else None
