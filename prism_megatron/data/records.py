"""Real image questions: one folder with ``data.jsonl`` and the images it names.

Every line is validated before anything else happens; a malformed one is a DataError naming file, line and field.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from prism_megatron.data.reading.fields import check_text, check_texts, image_path, lines_of, object_of
from prism_megatron.data.reading.intake import EvaluationOnlyError, RepeatedIdError, Sieve
from prism_megatron.errors import DataError
from prism_megatron.strict_json import parse_json

Purpose = Literal["train", "evaluate"]
Part = Literal["train", "validation"]

KEYS = ("id", "image", "question", "choices", "answer", "answer_type", "solution", "caption", "source")
REQUIRED_TEXT = ("id", "image", "question", "answer", "answer_type", "source")
OPTIONAL_TEXT = ("solution", "caption")
MAY_HAVE = ("difficulty",)
ANSWER_PATTERNS = {
    "choice": r"[A-Z]",
    "integer": r"-?[0-9]+",
    "float": r"-?([0-9]+\.?[0-9]*|\.[0-9]+)",
    "text": r".+",
    "bool": r"true|false",
}
# Benchmarks whose scores people report, however their folder is named.
EVALUATION_ONLY_SETS = ("mathvision_testmini",)
EVALUATION_ONLY_SOURCES = ("mathvision/",)


@dataclass(frozen=True)
class Record:
    """One validated line. ``image`` is the path of an existing file inside the set's folder."""

    id: str
    image: Path
    question: str
    choices: tuple[str, ...] | None
    answer: str
    solution: str | None
    caption: str | None
    source: str
    answer_type: str | None = None
    """what kind of answer it is, one of ``ANSWER_PATTERNS``; None for a record that was never read"""
    where: str = ""
    """its file and line; empty for a record that was never read"""
    difficulty: str | None = None
    """where a line says it: what an evaluation tells apart"""

    @property
    def question_text(self) -> str:
        """The question as it is asked, choices as lettered lines."""
        return lettered(self.question, self.choices)


def lettered(question: str, choices: Sequence[str] | None) -> str:
    """The question as it is asked, with a line for each choice."""
    return "\n".join([question, *(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(choices or ()))])


def read_records(folder: Path, *, purpose: Purpose, sieve: Sieve | None = None) -> tuple[Record, ...]:
    """Read and check a whole set, in file order.

    Raises DataError for a set that is not there, is empty or is for evaluation only and is to be trained on. A
    malformed line, an image outside the folder, an id used twice or a line of such a set is one too, or is left to the
    ``sieve`` where there is one.
    """
    folder = folder.resolve()
    path = folder / "data.jsonl"
    if not path.is_file():
        raise DataError(f"{path} does not exist; --data names a folder with data.jsonl and images")
    if purpose == "train":
        refuse_evaluation_folder(folder)
    records = []
    line_of_id: dict[str, str] = {}
    lines = list(lines_of(path))
    for where, line in lines:
        with nullcontext() if sieve is None else sieve.catching():
            record = record_of(line, folder, where)
            if record.id in line_of_id:
                raise RepeatedIdError(
                    f"{where}: field id: {record.id!r} was used before, in line {line_of_id[record.id]}"
                )
            if purpose == "train":
                refuse_evaluation_source(record.source, where)
            line_of_id[record.id] = where.rpartition(":")[2]
            records.append(record)
    if not lines:
        raise DataError(f"{path} holds no records")
    if sieve is not None:
        sieve.lines = len(lines)
    return tuple(records)


class Named(Protocol):
    """Anything that names itself and the set it comes from."""

    @property
    def id(self) -> str: ...

    @property
    def source(self) -> str: ...


def in_part(record: Named, part: Part, *, validation_share: float) -> bool:
    """Whether a record belongs to this part. Depends on its group alone, not on the file's order or length."""
    digest = hashlib.blake2b(id_group(record).encode(), digest_size=8).digest()
    is_validation = int.from_bytes(digest, "little") / 2**64 < validation_share
    return is_validation == (part == "validation")


def id_group(record: Named) -> str:
    """Records that must stay together: NLVR items with one first number share a sentence."""
    match = re.match(r"\D*\d+", record.id) if record.source.startswith("nlvr/") else None
    return match[0] if match else record.id


def record_of(line: bytes, folder: Path, where: str) -> Record:
    """One line, checked; ``folder`` has no links in it. Raises DataError, naming ``where`` and the field."""
    fields = object_of(line, KEYS, where, may_have=MAY_HAVE)
    for key in REQUIRED_TEXT:
        check_text(fields[key], key, where)
    for key in OPTIONAL_TEXT:
        if fields[key] is not None:
            check_text(fields[key], key, where, or_null=True)
    difficulty = fields.get("difficulty")
    if difficulty is not None:
        check_text(difficulty, "difficulty", where, or_null=True)
    choices = fields["choices"]
    if choices is not None:
        check_texts(choices, "choices", where, least=2, most=26, wanted="a list of 2 to 26 texts or null")
    _check_answer(fields["answer"], fields["answer_type"], choices, where)
    return Record(
        id=fields["id"],
        image=image_path(fields["image"], folder, where),
        question=fields["question"],
        choices=None if choices is None else tuple(choices),
        answer=fields["answer"],
        solution=fields["solution"],
        caption=fields["caption"],
        source=fields["source"],
        answer_type=fields["answer_type"],
        where=where,
        difficulty=difficulty,
    )


def _check_answer(answer: str, answer_type: str, choices: list[str] | None, where: str) -> None:
    if answer_type not in ANSWER_PATTERNS:
        raise DataError(f"{where}: field answer_type: {answer_type!r} is none of {', '.join(ANSWER_PATTERNS)}")
    if not re.fullmatch(ANSWER_PATTERNS[answer_type], answer, re.DOTALL):
        raise DataError(f"{where}: field answer: {answer!r} is not of answer_type {answer_type}")
    if (answer_type == "choice") != (choices is not None):
        raise DataError(f"{where}: field choices: needed for answer_type choice and for no other")
    if choices is not None and ord(answer) - 65 >= len(choices):
        raise DataError(f"{where}: field answer: {answer!r} is not the letter of one of {len(choices)} choices")


def refuse_evaluation_folder(folder: Path) -> None:
    """Raise DataError for a set whose folder, or the ``sets.json`` beside it, says that it is for evaluation only."""
    if _marked_evaluation_only(folder):
        raise DataError(f"{folder} is for evaluation only; train on another set")


def refuse_evaluation_source(source: str, where: str) -> None:
    """Raise DataError for a line of a benchmark whose scores people report."""
    if source.startswith(EVALUATION_ONLY_SOURCES):
        raise EvaluationOnlyError(f"{where}: field source: {source!r} is for evaluation only; train on another set")


def _marked_evaluation_only(folder: Path) -> bool:
    if folder.name in EVALUATION_ONLY_SETS:
        return True
    index = folder.parent / "sets.json"
    if not index.is_file():
        return False
    try:
        about = parse_json(index.read_bytes()).get(folder.name, {})
        return bool(about.get("evaluation_only", False))
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{index}: an object of objects expected: {error}") from error
