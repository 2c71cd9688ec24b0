"""What all formats share once a record's fields are found: settings, checked values, and the finished conversation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from prism_megatron.config.formats import FormatConfig
from prism_megatron.data.conversation import Conversation, Picture, Turn
from prism_megatron.data.reading.fields import check_text
from prism_megatron.data.records import Purpose, refuse_evaluation_source
from prism_megatron.data.segments import parse_response, response_text
from prism_megatron.errors import ConfigError, DataError

Row = Mapping[str, Any]
"""One record as it was stored: fields of a JSON object, columns of a Parquet row."""


@dataclass(frozen=True)
class Reading:
    """How the records of one set are read. ``folder`` has no links in it, and paths of images start from it."""

    config: FormatConfig
    purpose: Purpose
    folder: Path
    set_name: str
    """the source of records that name none"""

    @property
    def settings(self) -> str:
        """Whatever changes what is read beside the files themselves."""
        config = self.config
        return json.dumps([config.plain_answers, sorted(config.columns), str(config.images), config.split])


@lru_cache(maxsize=8)  # asked for every field of every record
def names_of(columns: tuple[str, ...], known: tuple[str, ...]) -> Mapping[str, str]:
    """``question=problem`` as ``{"question": "problem"}``. Raises ConfigError for anything else."""
    names = {}
    for pair in columns:
        field, separator, name = pair.partition("=")
        if not separator or not name or field not in known:
            raise ConfigError(f"--columns {pair} must be FIELD=NAME, with FIELD one of {', '.join(known)}")
        names[field] = name
    return names


def object_in(data: bytes | str, where: str) -> Any:
    """What a piece of JSON holds. Raises DataError for anything that is no JSON, or no UTF-8."""
    try:
        return json.loads(data if isinstance(data, str) else data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise DataError(f"{where}: not JSON: {error}") from error


def row_of(value: Any, where: str) -> Row:
    """A record must be an object. Raises DataError."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: an object with the record's fields expected, not {_kind(value)}")
    return value


def text_in(value: Any, key: str, where: str) -> str | None:
    """Text, or a number as text; None for what is missing or empty. Raises DataError for anything else."""
    if value is None or value == "":
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    check_text(value, key, where)
    return str(value)


def texts_in(value: Any, key: str, where: str) -> tuple[str, ...] | None:
    """A list of texts; None for what is missing or empty. Raises DataError for anything else."""
    if value is None or value in ([], ""):
        return None
    texts = [text_in(item, key, where) for item in value] if isinstance(value, list) else [None]
    if None in texts:
        raise DataError(f"{where}: field {key}: a list of texts expected, not {_kind(value)}")
    return tuple(text for text in texts if text is not None)


def demonstration(
    caption: str | None, solution: str | None, answer: str | None, *, where: str, reading: Reading
) -> str:
    """The assistant's text: the three tagged parts where the record has them, or the answer alone where that is asked.

    Raises DataError for a record with neither, and for bodies that hold tags of their own.
    """
    if answer is None:
        raise DataError(f"{where}: field answer: missing, and the record has no other text to learn from")
    if caption is None or solution is None:
        if reading.config.plain_answers:
            return answer
        raise DataError(
            f"{where}: field {'caption' if caption is None else 'solution'}: missing; "
            "--plain-answers learns the answer alone from such records"
        )
    text = response_text(caption, solution, answer)
    problem = parse_response(text.encode())
    if isinstance(problem, str):
        raise DataError(f"{where}: caption, solution and answer make no valid response: {problem}")
    return text


def finished(
    turns: tuple[Turn, ...],
    *,
    where: str,
    reading: Reading,
    id: str | None = None,  # noqa: A002 the field's name
    source: str | None = None,
    answer: str | None = None,
) -> Conversation:
    """The conversation, refused where its source is a benchmark and it is to be trained on (DataError).

    A record without an id gets one from what it holds, so that it stays in its part wherever in a file it stands.
    """
    source = reading.set_name if source is None else source
    if reading.purpose == "train":
        refuse_evaluation_source(source, where)
    return Conversation(id or content_digest(turns, folder=reading.folder).hex(), turns, source, answer)


def content_digest(turns: tuple[Turn, ...], *, folder: Path | None = None) -> bytes:
    """12 bytes that stand for turns and images; images in files stand there by their paths, below ``folder`` if given.

    Their bytes are not read for this.
    """
    digest = hashlib.blake2b(digest_size=12)
    for turn in turns:
        for part in turn.parts:
            data = _stored(part, folder) if isinstance(part, Picture) else part.encode(errors="surrogatepass")
            digest.update(f"{turn.role} {type(part).__name__} {len(data)} ".encode())
            digest.update(data)
    return digest.digest()


def _stored(picture: Picture, folder: Path | None) -> bytes:
    stored = picture.stored
    if isinstance(stored, bytes):
        return stored
    return str(stored if folder is None else stored.relative_to(folder)).encode(errors="surrogateescape")


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
