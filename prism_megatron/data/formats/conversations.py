"""Conversations as JSON lines, in our own spelling: what every other format can be turned into without a loss.

Every line has ``id``, ``source`` and ``turns``, and may have ``answer``, the answer alone. A turn has a ``role`` (first
``system`` or none, then ``user`` and ``assistant`` in alternation, the last one the assistant's) and ``parts``: text,
or a list of ``{"text": …}`` and, in a user's turn, ``{"image": …}``, a path below the file's folder.

Example::

    {"id": "7", "source": "mine", "answer": "2", "turns": [
        {"role": "user", "parts": [{"image": "images/7.png"}, {"text": "How many circles?"}]},
        {"role": "assistant", "parts": "There are two of them."}]}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from prism_megatron.data.conversation import Conversation, Picture, Role, Turn
from prism_megatron.data.formats.files.base import ByteReader, Place, line_places
from prism_megatron.data.reading.fields import check_text, image_path, object_of
from prism_megatron.data.records import Purpose, refuse_evaluation_folder, refuse_evaluation_source
from prism_megatron.errors import DataError

REQUIRED = ("id", "source", "turns")
OPTIONAL = "answer"


@dataclass(frozen=True)
class ConversationLines:
    """One file of conversations."""

    path: Path
    purpose: Purpose = "train"
    reader: ByteReader = field(default_factory=ByteReader, compare=False, repr=False)
    name: ClassVar[str] = "conversations"
    settings: ClassVar[str] = ""

    def shards(self) -> tuple[Path, ...]:
        """Raises DataError if the file is not there, or lies in a set for evaluation only and is to be trained on."""
        if self.purpose == "train":
            refuse_evaluation_folder(self.path.parent.resolve())
        if not self.path.is_file():
            raise DataError(f"{self.path} is no file; the format {self.name} is a file with a JSON object to a line")
        return (self.path.resolve(),)

    def scan(self, shard: Path) -> Iterator[Place]:
        return line_places(shard)

    def read(self, shard: Path, place: Place) -> Conversation:
        """Raises DataError for a malformed line, and for one of a benchmark that is to be trained on."""
        found = conversation_of(self.reader.read(shard, place), shard.parent, place.of(shard))
        if self.purpose == "train":
            refuse_evaluation_source(found.source, place.of(shard))
        return found


def conversation_of(line: bytes, folder: Path, where: str) -> Conversation:
    """One line, checked. ``folder`` holds its images and has no links in it. Raises DataError."""
    keys = (*REQUIRED, OPTIONAL) if f'"{OPTIONAL}"'.encode() in line else REQUIRED
    fields = object_of(line, keys, where)
    for key in ("id", "source", *keys[len(REQUIRED) :]):
        check_text(fields[key], key, where)
    turns = fields["turns"]
    if not isinstance(turns, list):
        raise DataError(f"{where}: field turns: a list expected")
    made = tuple(_turn(turn, folder, f"{where}: turn {number}") for number, turn in enumerate(turns, start=1))
    spoken = [turn.role for turn in made if turn.role != "system"]
    alternates = spoken == ["user", "assistant"] * (len(spoken) // 2) and spoken
    if not alternates or any(turn.role == "system" for turn in made[1:]):
        found = ", ".join(turn.role for turn in made) or "none"
        raise DataError(
            f"{where}: field turns: user and assistant in alternation expected, the assistant last, after a system "
            f"turn or none, and they are {found}"
        )
    return Conversation(fields["id"], made, fields["source"], fields.get(OPTIONAL))


def _turn(value: Any, folder: Path, where: str) -> Turn:
    if not isinstance(value, dict) or set(value) != {"role", "parts"}:
        raise DataError(f"{where}: an object of role and parts expected")
    role: Role | None = next((known for known in ("system", "user", "assistant") if known == value["role"]), None)
    if role is None:
        raise DataError(f"{where}: field role: {value['role']!r} is none of system, user, assistant")
    parts = value["parts"]
    parts = [{"text": parts}] if isinstance(parts, str) else parts
    if not isinstance(parts, list) or not parts:
        raise DataError(f"{where}: field parts: text, or a list of objects with text or image, expected")
    return Turn(role, tuple(_part(part, role, folder, where) for part in parts))


def _part(value: Any, role: Role, folder: Path, where: str) -> str | Picture:
    if not isinstance(value, dict) or set(value) not in ({"text"}, {"image"}):
        raise DataError(f"{where}: field parts: objects with text or image, and nothing else, expected")
    ((kind, text),) = value.items()
    check_text(text, kind, where)
    if kind == "text":
        return str(text)
    if role != "user":
        raise DataError(f"{where}: field parts: an image in a turn of the {role}; only users show images")
    return Picture(image_path(text, folder, where))
