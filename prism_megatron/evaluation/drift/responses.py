"""Sets of responses as they are stored, and the segments of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prism_megatron.data.reading.fields import kind_of, lines_of
from prism_megatron.data.reading.intake import JsonError
from prism_megatron.data.segments import parse_response, response_text
from prism_megatron.errors import DataError
from prism_megatron.strict_json import parse_json

SEGMENTS = ("caption", "reasoning", "answer", "whole")
"""What is compared. All but the last need a response in the asked form."""

Mode = Literal["greedy", "sampled"]
_MARKS = {"response", "text", "caption", "think"}
_FORMS = "id with response, with caption, think (or solution) and answer, or a line of prism-evaluate's answers"


@dataclass(frozen=True)
class Responses:
    """The first response to each question, by its id, as texts by segment; what is not there has no key.

    Example: ``Responses("base", {"7": {"whole": "two"}}, not_in_form=1, left_out=0)``.
    """

    name: str
    texts: Mapping[str, Mapping[str, str]]
    not_in_form: int
    """responses that have no segments, of those that are used"""
    left_out: int
    """lines that are not used: further responses to a question, answers of the other mode, failures"""

    def of_segment(self, segment: str) -> dict[str, str]:
        """By id, the texts of those responses that have the segment."""
        return {id_: parts[segment] for id_, parts in self.texts.items() if segment in parts}


def read_responses(name: str, path: Path, *, mode: Mode) -> Responses:
    """Read a file of JSON lines. ``mode`` chooses among the answers of an evaluation, which have several.

    Several responses to one question are no independent draws of a response, so the first stands for all. Raises
    DataError, naming file, line and field, for a malformed line, and where nothing is left.
    """
    rows = [_row(line, where) for where, line in lines_of(path)]
    sets = {row["set"] for row in rows if "set" in row}
    texts: dict[str, Mapping[str, str]] = {}
    for row in rows:
        id_ = f"{row['set']}/{row['id']}" if len(sets) > 1 and "set" in row else row["id"]
        if row.get("failure") or row.get("mode", mode) != mode or id_ in texts:
            continue
        texts[id_] = row["texts"]
    if not texts:
        raise DataError(f"{path} holds no responses to compare (of {len(rows)} lines); see --mode for an evaluation's")
    not_in_form = sum("caption" not in parts and "reasoning" not in parts for parts in texts.values())
    return Responses(name, texts, not_in_form, len(rows) - len(texts))


def holds_responses(path: Path) -> bool:
    """Whether the first line has a field that responses are read from; demonstrations have others."""
    for _, line in lines_of(path):
        try:
            fields = parse_json(line)
        except ValueError:
            return path.suffix == ".jsonl"
        is_record = isinstance(fields, dict) and "turns" not in fields and "messages" not in fields
        return is_record and bool(_MARKS & fields.keys()) and "id" in fields
    return True


def segments_of(response: str) -> dict[str, str]:
    """A response without its end token, by segment; the whole alone where it is not in the asked form."""
    parsed = parse_response(response.encode("utf-8", errors="replace"))
    if isinstance(parsed, str):
        return {"whole": response}
    bodies = {"caption": parsed.caption, "reasoning": parsed.think, "answer": parsed.answer}
    return {segment: body.strip() for segment, body in bodies.items()} | {"whole": response}


def _row(line: bytes, where: str) -> dict[str, Any]:
    """The fields of one line that count, with ``texts`` by segment. Raises DataError; other fields may be there."""
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise JsonError(f"{where}: not a JSON object: {error}") from error
    if not isinstance(fields, dict):
        raise JsonError(f"{where}: not a JSON object, but {kind_of(fields)}; write one object to a line")
    _text(fields, "id", where)
    row = {key: _text(fields, key, where) for key in ("id", "set", "mode", "failure") if key in fields}
    whole = next((key for key in ("response", "text") if key in fields), None)
    if whole is not None:
        return row | {"texts": segments_of(_text(fields, whole, where))}
    return row | {"texts": _written_apart(fields, where)}


def _written_apart(fields: Mapping[str, Any], where: str) -> dict[str, str]:
    """Of bodies that stand in fields of their own, of which some may be null; the whole needs all three."""
    think = "think" if "think" in fields else "solution"
    names = {"caption": "caption", "reasoning": think, "answer": "answer"}
    found = {segment: _text(fields, key, where) for segment, key in names.items() if fields.get(key) is not None}
    if not found:
        raise DataError(f"{where}: nothing to compare; a line has {_FORMS}")
    if len(found) == len(names):
        found["whole"] = response_text(found["caption"], found["reasoning"], found["answer"])
    return {segment: text.strip() for segment, text in found.items() if text.strip()}


def _text(fields: Mapping[str, Any], key: str, where: str) -> str:
    if key not in fields:
        raise DataError(f"{where}: field {key}: missing; a line has {_FORMS}")
    value = fields[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: field {key}: text expected, and it is {kind_of(value)}; put it in quotes")
    return value
