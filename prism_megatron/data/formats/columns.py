"""Hugging Face ``datasets``, and any table: a question, an image and an answer in columns of their own.

Example: ``{"problem": "How many circles?", "image": {"bytes": …, "path": "7.png"}, "answer": "2"}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prism_megatron.data.conversation import Conversation, Picture, Turn
from prism_megatron.data.formats.files.reading import Reading, Row, demonstration, finished, names_of, text_in, texts_in
from prism_megatron.data.formats.pictures import pictures_in
from prism_megatron.data.formats.turns import assistant_text, question_turn
from prism_megatron.errors import DataError

NAMES: dict[str, tuple[str, ...]] = {
    "id": ("id", "question_id", "uid", "sample_id"),
    "source": ("source", "data_source", "dataset"),
    "messages": ("messages", "conversations"),
    "system": ("system",),
    "question": ("question", "problem", "query", "prompt", "instruction"),
    "choices": ("choices", "options"),
    "images": ("images", "image", "picture", "img"),
    "response": ("response", "output", "completion"),
    "caption": ("caption", "image_description", "description"),
    "solution": ("solution", "rationale", "explanation", "reasoning", "cot"),
    "answer": ("answer", "ground_truth", "label"),
}
"""Fields by the names that sets give them; of several that a record has, the first counts."""
FIELDS = tuple(NAMES)


def column(row: Row, field: str, *, where: str, reading: Reading) -> Any:
    """What the record has for a field, under the name that ``--columns`` gives or one of the usual ones; or None.

    Raises DataError where a name that was given is not there.
    """
    named = names_of(reading.config.columns, FIELDS).get(field)
    if named is not None:
        if named not in row:
            raise DataError(f"{where}: --columns {field}={named}: the record has {', '.join(map(str, row))}")
        return row[named]
    return next((row[name] for name in NAMES[field] if row.get(name) is not None), None)


def found_names(row: Row, *, reading: Reading) -> dict[str, str]:
    """Under which names the record's fields are read: ``{"question": "problem"}``."""
    named = names_of(reading.config.columns, FIELDS)
    usual = {field: next((name for name in names if row.get(name) is not None), None) for field, names in NAMES.items()}
    return {field: name for field in NAMES if (name := named.get(field, usual[field])) is not None}


def texts_of(row: Row, *fields: str, where: str, reading: Reading) -> tuple[str | None, ...]:
    """The texts of several fields. Raises DataError."""
    return tuple(text_in(column(row, field, where=where, reading=reading), field, where) for field in fields)


def images_of(row: Row, *, where: str, reading: Reading) -> tuple[Picture, ...]:
    """The record's images. Raises DataError."""
    return pictures_in(column(row, "images", where=where, reading=reading), where=where, reading=reading)


def parse(row: Row, *, where: str, reading: Reading, pictures: Sequence[Picture] | None = None) -> Conversation:
    """A question and its demonstration. ``pictures`` stand in for the row's own where they are stored beside it.

    Raises DataError, naming ``where`` and the field, for a record without a question or a text to learn from.
    """
    texts = texts_of(row, "id", "source", "system", "question", "response", where=where, reading=reading)
    identity, source, system, question, response = texts
    caption, solution, answer = texts_of(row, "caption", "solution", "answer", where=where, reading=reading)
    if question is None:
        raise DataError(
            f"{where}: field question: missing; it is looked for as {', '.join(NAMES['question'])}, "
            f"the record has {', '.join(map(str, row))}; name it by --columns question=NAME"
        )
    choices = texts_in(column(row, "choices", where=where, reading=reading), "choices", where)
    if choices is not None:
        if len(choices) > 26:
            raise DataError(f"{where}: field choices: {len(choices)} choices; there are letters for 26")
        question = "\n".join([question, *(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(choices))])
    shown = images_of(row, where=where, reading=reading) if pictures is None else pictures
    if response is None:
        response = demonstration(caption, solution, answer, where=where, reading=reading)
    turns = [Turn("system", (system,))] if system else []
    turns += [question_turn(question, shown, where=where), Turn("assistant", (assistant_text(response),))]
    return finished(tuple(turns), where=where, reading=reading, id=identity, source=source, answer=answer)
