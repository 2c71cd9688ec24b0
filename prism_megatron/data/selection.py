"""A file that says which prompts are trained on: ``selected.jsonl`` of ``prism-select-prompts``, or your own.

A line needs an ``id`` alone, of a record or of a scene. One with a ``digest`` is held against what has the id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from prism_megatron.data.reading.fields import check_text, lines_of, object_of
from prism_megatron.data.reading.intake import RepeatedIdError
from prism_megatron.data.records import Record
from prism_megatron.data.scenes import Scene
from prism_megatron.errors import DataError

_ALSO = ("pass_rate", "passes", "rollouts", "digest")
_DIGEST_LENGTH = 16
_SELECT = "select them anew by prism-select-prompts, or name the set that they are of by --data"


class SelectedLine(NamedTuple):
    """One line of the file: where it is, and what it says of its record."""

    where: str
    digest: str | None


@dataclass(frozen=True)
class Selection:
    """The prompts to train on, by id."""

    lines: Mapping[str, SelectedLine]

    def __contains__(self, record: Record) -> bool:
        return record.id in self.lines

    def check(self, records: Sequence[Record], data: Path) -> None:
        """Raise DataError, naming the line, unless every id is that of one of ``records`` of ``data``, as it was."""
        by_id = {record.id: record for record in records}
        for name, (where, digest) in self.lines.items():
            record = by_id.get(name)
            if record is None:
                raise DataError(f"{where}: field id: {name!r} is none of the training part of {data}; {_SELECT}")
            if digest not in (None, digest_of(record)):
                raise DataError(
                    f"{where}: field digest: {name!r} of {data} has another question or answer than when it was "
                    f"selected; {_SELECT}"
                )


def read_selection(path: Path) -> Selection:
    """Read a file of ids. Raises DataError, naming the line, for one that is malformed, has an id twice or is empty."""
    lines: dict[str, SelectedLine] = {}
    for where, line in lines_of(path):
        fields = object_of(line, ("id",), where, may_have=_ALSO)
        check_text(fields["id"], "id", where)
        digest = fields.get("digest")
        if digest is not None:
            check_text(digest, "digest", where)
        if fields["id"] in lines:
            first = lines[fields["id"]].where.rpartition(":")[2]
            raise RepeatedIdError(f"{where}: field id: {fields['id']!r} was used before, in line {first}")
        lines[fields["id"]] = SelectedLine(where, digest)
    if not lines:
        raise DataError(
            f"{path}:1: no prompt is selected; select some, with a wider --keep-from and --keep-to, by "
            "prism-select-prompts"
        )
    return Selection(lines)


def digest_of(asked: Record | Scene) -> str:
    """Of what is asked and what is right. Blind to the pixels of the image."""
    if isinstance(asked, Scene):
        text = json.dumps([asked.question.text, asked.answer])
    else:
        text = json.dumps([asked.question_text, asked.answer, asked.answer_type])
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_LENGTH]
