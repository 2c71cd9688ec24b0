"""The third step: of the questions about one picture one stays."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prism_megatron.curation.asking import Speaker
from prism_megatron.curation.files import Row, row_of
from prism_megatron.curation.prompts.pictures import data_url
from prism_megatron.curation.prompts.replies import choice_of
from prism_megatron.curation.prompts.templates import as_data, template
from prism_megatron.curation.select import BAD_IMAGE
from prism_megatron.data.reading.intake import ImageError

TRIES = 2
ANOTHER, NONE_FITS = "another question of the picture was chosen", "no question is one that the picture alone answers"
NO_CHOICE = "the disambiguator gave no choice"
_DIGEST_DIGITS = 16


def by_picture(path: Path) -> Iterator[list[Row]]:
    """The rows that the step before kept, those of one picture together, in the order of pictures' first rows.

    Memory grows by 24 bytes a row; rows are read again where they lie. Pictures are told apart by 64 bits of their
    hash: two of 113,000 are taken for one with a chance of 4e-10.
    """
    digests, offsets = array("Q"), array("q")
    with path.open("rb") as file:
        offset = 0
        for line in file:
            row = row_of(line, path)
            if row.kept:
                digests.append(int(row.problem.picture[:_DIGEST_DIGITS], 16))
                offsets.append(offset)
            offset += len(line)
    _, first, group = np.unique(np.frombuffer(digests, dtype=np.uint64), return_index=True, return_inverse=True)
    order = np.argsort(first[group], kind="stable")
    with path.open("rb") as file:
        rows: list[Row] = []
        for place in order:
            file.seek(offsets[place])
            row = row_of(file.readline(), path)
            if rows and rows[0].problem.picture != row.problem.picture:
                yield rows
                rows = []
            rows.append(row)
        if rows:
            yield rows


@dataclass(frozen=True)
class Disambiguation:
    """Without a ``speaker`` the first question of every picture stays."""

    speaker: Speaker | None

    def of(self, rows: Sequence[Row]) -> list[Row]:
        """The rows of one picture, of which at most one is kept. Raises PrismError as asking does."""
        if self.speaker is None:
            return [row if number == 0 else row.fallen(ANOTHER, rows[0].problem.id) for number, row in enumerate(rows)]
        notes: list[dict[str, Any]] = []
        try:
            choice = self._choice(self.speaker, rows, notes)
        except ImageError as error:
            return [row.fallen(BAD_IMAGE, str(error)) for row in rows]
        # The calls stand in the first row alone, so that a sum over rows counts them once.
        told = [
            row.having("disambiguate", {"choice": choice, "of": len(rows), "calls": notes if number == 0 else []})
            for number, row in enumerate(rows)
        ]
        if choice is None:
            return [row.fallen(NO_CHOICE) for row in told]
        if choice == 0:
            return [row.fallen(NONE_FITS) for row in told]
        return [
            row if number == choice else row.fallen(ANOTHER, rows[choice - 1].problem.id)
            for number, row in enumerate(told, start=1)
        ]

    def _choice(self, speaker: Speaker, rows: Sequence[Row], notes: list[dict[str, Any]]) -> int | None:
        """The number that was chosen, 0 for none of them; None where no reply said one."""
        asked = template("disambiguate")
        pairs = [
            {"number": number, "question": row.problem.asked, "right_answer": row.problem.answer}
            for number, row in enumerate(rows, start=1)
        ]
        text, image = asked.filled(PAIRS=as_data(pairs)), data_url(rows[0].problem.image_path)
        for number in range(TRIES):
            said = speaker.ask(text, image, number=number, prompt=asked.version)
            response = said.response
            whole = response.answered and response.finish == "stop"
            choice = choice_of(response.text, most=len(rows)) if whole else None
            if choice is not None:
                notes.append(said.note(f"chose {choice}"))
                return choice
            notes.append(said.note("no choice", response.kind if not response.answered else "", excerpt=True))
        return None
