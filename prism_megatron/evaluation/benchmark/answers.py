"""What was answered: a file of one line an answer, in an order known beforehand, that outlives a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

from prism_megatron.data.reading.fields import object_of
from prism_megatron.disk import writing
from prism_megatron.errors import DataError

ANSWERS = "answers.jsonl"
_ELSEWHERE = "begin in another --output"

Mode = Literal["greedy", "sampled"]


@dataclass(frozen=True)
class Item:
    """One question, as figures are grouped by it.

    Example: ``Item("tabmwp", "tabmwp-7", "0a1b…", kind="integer", source="tabmwp/dev1k", difficulty=None)``.
    """

    set: str
    id: str
    digest: str
    """of all that is asked, the image's bytes too, and of what is right"""
    kind: str
    """of its answer, or of a scene its question's"""
    source: str
    difficulty: str | None = None


class Place(NamedTuple):
    """Which answer it is."""

    set: str
    id: str
    digest: str
    mode: str
    sample: int


def places_of(item: Item, samples: int) -> list[Place]:
    """An item's answers in the order of the file: the greedy one, then those that are drawn."""
    key = item.set, item.id, item.digest
    return [Place(*key, "greedy", 0), *(Place(*key, "sampled", number) for number in range(samples))]


@dataclass(frozen=True)
class Answered:
    """One answer with its verdict: a line of the file."""

    set: str
    id: str
    digest: str
    mode: str
    sample: int
    counts: bool
    """right, and in the form that it has to have where that is asked for"""
    right: bool
    """right in whatever form"""
    valid: bool
    """in the asked form"""
    truncated: bool
    """cut off at the greatest length"""
    tokens: int | None
    """its length; None where an endpoint does not say it"""
    kind: str
    """by which rules it was compared"""
    answer: str
    """what it comes to, as plain text; empty for none"""
    problem: str
    """what is wrong with its form, or why it could not be compared"""
    text: str
    failure: str
    """why there is no answer; empty where there is one"""

    @property
    def place(self) -> Place:
        return Place(self.set, self.id, self.digest, self.mode, self.sample)


@dataclass(frozen=True)
class AnswerFile:
    """The answers of ``places``, in this order, which are given in batches of so many."""

    path: Path
    places: Sequence[Place]
    batches: Sequence[int]

    def reopen(self) -> tuple[list[Answered], int]:
        """What whole batches have, and how many these are, after the rest was cut off: a kill leaves parts.

        Raises DataError for a whole line that is not of its place, DiskError where the file cannot be cut.
        """
        if not self.path.exists():
            return [], 0
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last end of a line is a part of one
        found = [self._read(line, number) for number, line in enumerate(lines)]
        ends = list(accumulate(self.batches, initial=0))
        whole = sum(end <= len(found) for end in ends) - 1
        del found[ends[whole] :]
        with writing(self.path), self.path.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines[: len(found)]))
            os.fsync(file.fileno())
        return found, whole

    def append(self, answers: Sequence[Answered]) -> None:
        """Add a batch; once this returns it is on the disk. Raises DiskError where it cannot be."""
        text = "".join(f"{json.dumps(asdict(answer))}\n" for answer in answers)
        with writing(self.path), self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def _read(self, line: bytes, number: int) -> Answered:
        where = f"{self.path}:{number + 1}"
        answer = read_answer(line, where)
        if number >= len(self.places) or answer.place != self.places[number]:
            raise DataError(f"{where}: {answer.id!r} ({answer.mode}) is not the answer of its place; {_ELSEWHERE}")
        return answer


def read_answer(line: bytes, where: str) -> Answered:
    """One line. Raises DataError, naming ``where`` and the field, for one that is none."""
    values = object_of(line, [one.name for one in fields(Answered)], where)
    forms = {"str": str, "bool": bool, "int": int, "int | None": int}
    for one in fields(Answered):
        value = values[one.name]
        may_miss = one.name == "tokens" and value is None
        if not may_miss and type(value) is not forms[str(one.type)]:
            raise DataError(f"{where}: field {one.name}: {one.type} expected; {_ELSEWHERE}")
    return Answered(**values)


def by_item(answers: Sequence[Answered]) -> dict[tuple[str, str], list[Answered]]:
    """The answers to each item (set and id), in the order of the file."""
    found: dict[tuple[str, str], list[Answered]] = {}
    for answer in answers:
        found.setdefault((answer.set, answer.id), []).append(answer)
    return found
