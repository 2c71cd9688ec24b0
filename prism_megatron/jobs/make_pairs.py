"""References above a student's stored answers, as the file that a warm-start reads: what ``prism-make-pairs`` does.

The reference of a record is its caption, solution and answer in the one layout; an answer of a student becomes a
rejected response where it is valid and says something else. Whatever else an answer holds is text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from prism_megatron.config.tools.make_pairs import Places
from prism_megatron.data.conversation import Picture
from prism_megatron.data.formats.pictures import data_of, extension_of
from prism_megatron.data.formats.write.new_folder import new_folder
from prism_megatron.data.pairs import read_pairs
from prism_megatron.data.reading.fields import kind_of, lines_of
from prism_megatron.data.reading.intake import JsonError
from prism_megatron.data.records import Record, read_records, refuse_evaluation_folder
from prism_megatron.data.segments import parse_response, response_text
from prism_megatron.errors import DataError
from prism_megatron.strict_json import parse_json

FILE, IMAGES = "pairs.jsonl", "images"
_CONTROL = re.compile(r"<\|[^<>|\s]{1,64}\|>|</?tool_(?:call|response)>")
"""What tokenizers of Qwen3-VL take for control tokens, which no response may hold."""
_FORMS = "a line has id and response, or is one of prism-evaluate's answers"

_FAILED, _OTHER_SET, _UNKNOWN, _OF_LEFT_OUT = "failed", "of another set", "of no record", "of a record that is left out"
_INVALID, _CONTROLS, _ALIKE = "in no valid form", "with control tokens or broken characters", "like the reference"
_REPEATED, _BEYOND = "given before", "beyond --rejected"
_REASONS = (_FAILED, _OTHER_SET, _UNKNOWN, _OF_LEFT_OUT, _INVALID, _CONTROLS, _ALIKE, _REPEATED, _BEYOND)
_INCOMPLETE, _NO_REFERENCE = "without a caption or a solution", "with a reference that is no valid response"
_NOTHING_REJECTED = "without an answer to reject"
_OF_RECORDS = (_INCOMPLETE, _NO_REFERENCE, _NOTHING_REJECTED)

Bodies = tuple[str, str, str]


class _Reference(NamedTuple):
    """What a record's answers stand below, and those answers."""

    text: str
    bodies: Bodies
    rejected: list[str]
    seen: set[Bodies]


class _Answer(NamedTuple):
    """One line of a file of answers; ``set`` and ``failure`` are empty where it does not say them."""

    id: str
    set: str
    failure: str
    text: str


def make_pairs(places: Places, *, rejected: int, say: Callable[[str], object]) -> None:
    """Write ``places.output`` whole or not at all, and say on one line what became of all answers and records.

    At most so many answers of a record are ``rejected``. Raises DataError for a malformed line, for a set that is for
    evaluation only, where a picture cannot be read and where nothing is left, and DiskError.
    """
    refuse_evaluation_folder(places.output.absolute())
    records = read_records(places.data, purpose="train")
    counts = Counter[str]()
    references = {record.id: made for record in records if (made := _reference(record, counts)) is not None}
    known = {record.id for record in records}
    answers = list(_answers(places.answers))
    several = len({one.set for one in answers if one.set}) > 1
    for one in answers:
        of_here = not several or one.set == places.data.resolve().name
        reason = _OTHER_SET if not of_here else _taken(one, references, known, most=rejected)
        if reason is not None:
            counts[reason] += 1
    paired = [record for record in records if record.id in references and references[record.id].rejected]
    counts[_NOTHING_REJECTED] = len(references) - len(paired)
    taken = sum(len(references[record.id].rejected) for record in paired)
    summary = _summary(counts, paired=len(paired), records=len(records), taken=taken, answers=len(answers))
    if not paired:
        raise DataError(f"{places.answers}: no pair can be made, so nothing was written: {summary}")
    with new_folder(places.output) as folder:
        _write(folder, paired, references)
        read_pairs(folder / FILE)
    say(f"{places.output / FILE}: {summary}")


def _reference(record: Record, counts: Counter[str]) -> _Reference | None:
    """What the record's answers stand below; one that has none is counted."""
    if record.caption is None or record.solution is None:
        counts[_INCOMPLETE] += 1
        return None
    text = response_text(record.caption, record.solution, record.answer)
    bodies = _bodies(text)
    if bodies is None or _is_broken(text):
        counts[_NO_REFERENCE] += 1
        return None
    return _Reference(text, bodies, [], {bodies})


def _taken(one: _Answer, references: Mapping[str, _Reference], known: set[str], *, most: int) -> str | None:
    """Reject the answer, or why it is left out."""
    if one.failure:
        return _FAILED
    if one.id not in known:
        return _UNKNOWN
    reference = references.get(one.id)
    if reference is None:
        return _OF_LEFT_OUT
    bodies = _bodies(one.text)
    if bodies is None:
        return _INVALID
    if _is_broken(one.text):
        return _CONTROLS
    if bodies in reference.seen:
        return _ALIKE if bodies == reference.bodies else _REPEATED
    if len(reference.rejected) == most:
        return _BEYOND
    reference.seen.add(bodies)
    reference.rejected.append(one.text)
    return None


def _bodies(text: str) -> Bodies | None:
    """Caption, reasoning and answer without what white space adds; None for what is no valid response."""
    parsed = parse_response(text.encode("utf-8", errors="replace"))
    if isinstance(parsed, str):
        return None
    caption, think, answer = (" ".join(body.split()) for body in (parsed.caption, parsed.think, parsed.answer))
    return caption, think, answer


def _is_broken(text: str) -> bool:
    """Whether it holds what is no text of a response: control tokens, or what stands for bytes that were no UTF-8."""
    half_pair = any("\ud800" <= character <= "\udfff" for character in text)
    return half_pair or "\ufffd" in text or _CONTROL.search(text) is not None


def _answers(path: Path) -> Iterator[_Answer]:
    """All lines. Raises DataError, naming file, line and field, for the first that is malformed."""
    for where, line in lines_of(path):
        try:
            fields = parse_json(line)
        except ValueError as error:
            raise JsonError(f"{where}: not a JSON object: {error}") from error
        if not isinstance(fields, dict):
            raise JsonError(f"{where}: not a JSON object, but {kind_of(fields)}; write one object to a line")
        name = "response" if "response" in fields else "text"
        for key in ("id", name):
            if key not in fields:
                raise DataError(f"{where}: field {key}: missing; {_FORMS}")
        texts = {key: fields.get(key, "") for key in ("id", "set", "failure", name)}
        for key, value in texts.items():
            if not isinstance(value, str):
                raise DataError(f"{where}: field {key}: text expected, and it is {kind_of(value)}; put it in quotes")
        yield _Answer(texts["id"], texts["set"], texts["failure"], texts[name])


def _write(folder: Path, paired: list[Record], references: Mapping[str, _Reference]) -> None:
    """The pairs in the order of the records, and one file of each picture. Raises DataError as :func:`make_pairs`."""
    (folder / IMAGES).mkdir()
    with (folder / FILE).open("w", encoding="utf-8") as file:
        for record in paired:
            reference = references[record.id]
            line = {
                "id": record.id,
                "image": _copied(record, folder),
                "question": record.question_text,
                "chosen": reference.text,
                "rejected": reference.rejected,
                "source": record.source,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _copied(record: Record, folder: Path) -> str:
    """The picture's path below the folder, which its content names: one picture is one file."""
    picture = Picture(record.image)
    extension, data = extension_of(picture, where=record.where), data_of(picture, where=record.where)
    name = f"{IMAGES}/{hashlib.blake2b(data, digest_size=16).hexdigest()}.{extension}"
    if not (folder / name).exists():
        (folder / name).write_bytes(data)
    return name


def _summary(counts: Counter[str], *, paired: int, records: int, taken: int, answers: int) -> str:
    def left_out(reasons: tuple[str, ...]) -> str:
        return ", ".join(f"{counts[reason]} {reason}" for reason in reasons if counts[reason]) or "none"

    return (
        f"{paired} of {records} records stand above {taken} of {answers} answers; records left out: "
        f"{left_out(_OF_RECORDS)}; answers left out: {left_out(_REASONS)}"
    )
