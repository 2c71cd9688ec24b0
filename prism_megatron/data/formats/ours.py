"""Our own folders: ``data.jsonl`` with nine fields a line, and the images that it names (``data/records.py``).

Example: ``{"id": "7", "image": "images/7.png", "question": "How many circles?", "choices": null, "answer": "2",
"answer_type": "integer", "solution": "I count.", "caption": "Two circles.", "source": "own"}``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from prism_megatron.data.conversation import Conversation, Picture, Turn
from prism_megatron.data.formats.files.base import ByteReader, Place, line_places
from prism_megatron.data.formats.files.reading import Reading, demonstration, finished
from prism_megatron.data.records import Record, record_of
from prism_megatron.errors import DataError

FILE = "data.jsonl"


@dataclass(frozen=True)
class OursCorpus:
    """A folder with ``data.jsonl``."""

    path: Path
    reading: Reading
    reader: ByteReader = field(default_factory=ByteReader, compare=False, repr=False)
    name: ClassVar[str] = "ours"

    @property
    def settings(self) -> str:
        return self.reading.settings

    def shards(self) -> tuple[Path, ...]:
        """Raises DataError without a ``data.jsonl``."""
        file = self.path if self.path.is_file() else self.path / FILE
        if not file.is_file():
            raise DataError(f"{file} does not exist; the format ours is a folder with {FILE} and images")
        return (file,)

    def scan(self, shard: Path) -> Iterator[Place]:
        return line_places(shard)

    def read(self, shard: Path, place: Place) -> Conversation:
        """Raises DataError for a malformed line."""
        where = place.of(shard)
        return conversation_of(
            record_of(self.reader.read(shard, place), self.reading.folder, where), where, self.reading
        )


def conversation_of(record: Record, where: str, reading: Reading) -> Conversation:
    """The image, the question as it is asked, and the reference. Raises DataError for a record without one."""
    text = demonstration(record.caption, record.solution, record.answer, where=where, reading=reading)
    turns = (Turn("user", (Picture(record.image), record.question_text)), Turn("assistant", (text,)))
    return finished(turns, where=where, reading=reading, id=record.id, source=record.source, answer=record.answer)
