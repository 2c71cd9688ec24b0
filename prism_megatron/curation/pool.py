"""The problems that a curation begins with, read line by line from folders in the form ours."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_megatron.data.reading.fields import lines_of
from prism_megatron.data.reading.intake import RepeatedIdError
from prism_megatron.data.records import Purpose, Record, record_of, refuse_evaluation_folder, refuse_evaluation_source
from prism_megatron.errors import DataError

FILE = "data.jsonl"
_PIECE = 2**20


@dataclass(frozen=True)
class Pool:
    """Folders of records, each with its first ``limit`` ones."""

    folders: Sequence[Path]
    purpose: Purpose
    limit: int | None = None
    check_going_on: Callable[[], object] = lambda: None
    """called at every record; raises PrismError where the command is to end"""

    def records(self) -> Iterator[Record]:
        """All of them, in order. Memory grows by some tens of bytes a record, for ids.

        Raises DataError for a malformed line, an image that is not there, an id that a folder has twice, a folder
        without records, and, where they are to be trained on, for folders and lines that are for evaluation only.
        """
        for folder in self.folders:
            yield from self._of(folder.resolve())

    def name_of(self, record: Record) -> str:
        """The record's id; where there are several folders, with the folder's name behind it."""
        return record.id if len(self.folders) == 1 else f"{record.id}@{_folder_of(record).name}"

    def digest(self) -> str:
        """Of all that the records say, and of their images' sizes: blind to a picture that another one of the same
        size in bytes takes the place of. Raises as :meth:`records`."""
        digest = hashlib.sha256()
        for record in self.records():
            about = (
                record.id, record.question, record.choices, record.answer, record.answer_type, record.source,
                record.difficulty, str(record.image), record.image.stat().st_size,
            )  # fmt: skip
            digest.update(repr(about).encode("utf-8"))
        return digest.hexdigest()

    def _of(self, folder: Path) -> Iterator[Record]:
        path = folder / FILE
        if not path.is_file():
            raise DataError(f"{path} does not exist; a recipe names folders with {FILE} and images")
        if self.purpose == "train":
            refuse_evaluation_folder(folder)
        seen: set[int] = set()
        for where, line in lines_of(path):
            if self.limit is not None and len(seen) == self.limit:
                return
            self.check_going_on()
            record = record_of(line, folder, where)
            if self.purpose == "train":
                refuse_evaluation_source(record.source, where)
            short = int.from_bytes(hashlib.blake2b(record.id.encode(), digest_size=8).digest(), "little")
            if short in seen:
                raise RepeatedIdError(f"{where}: field id: {record.id!r} was used before")
            seen.add(short)
            yield record
        if not seen:
            raise DataError(f"{path} holds no records")


def picture_of(record: Record) -> str:
    """Hash of the image file's content, 64 hexadecimal digits. Raises DataError for one that cannot be read."""
    digest = hashlib.sha256()
    try:
        with record.image.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise DataError(f"{record.where}: field image: {record.image} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _folder_of(record: Record) -> Path:
    return Path(record.where.rpartition(":")[0]).parent
