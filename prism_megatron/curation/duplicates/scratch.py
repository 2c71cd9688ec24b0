"""What a search for duplicates keeps on the disk meanwhile: questions and looks, read again for candidates only."""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from prism_megatron.curation.duplicates.look import LOOK_BYTES, Looks
from prism_megatron.data.records import Record
from prism_megatron.disk import writing

_FOLDER = ".duplicates"


class Question(NamedTuple):
    """What is kept of a record."""

    id: str
    source: str
    where: str
    text: str


class Scratch:
    """Two files that only grow, in 8 bytes of memory a question."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is there, and is this one's alone."""
        self._folder = folder
        self._texts, self._looks = (folder / name for name in ("questions", "looks"))
        self._text_file, self._look_file = self._texts.open("w+b"), self._looks.open("w+b")
        self._ends = array("Q", [0])
        self._num_looks = 0

    @classmethod
    @contextmanager
    def inside(cls, parent: Path) -> Iterator[Self]:
        """One in a hidden folder of ``parent``, which is removed at the end; so is one that a killed process left.

        Raises DiskError where nothing can be written there.
        """
        folder = parent / _FOLDER
        with writing(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            scratch = cls(folder)
        try:
            yield scratch
        finally:
            scratch._text_file.close()
            scratch._look_file.close()
            shutil.rmtree(folder, ignore_errors=True)

    def add_question(self, record: Record) -> None:
        """As number 0, 1, 2, … Raises DiskError."""
        row = json.dumps([record.id, record.source, record.where, record.question_text]).encode("ascii")
        with writing(self._texts):
            self._text_file.write(row)
        self._ends.append(self._ends[-1] + len(row))

    def add_look(self, look: bytes) -> None:
        """As number 0, 1, 2, … Raises DiskError."""
        with writing(self._looks):
            self._look_file.write(look)
        self._num_looks += 1

    def flush(self) -> None:
        """To be called after the last one was added, and before any is read. Raises DiskError."""
        with writing(self._folder):
            self._text_file.flush()
            self._look_file.flush()

    def question(self, number: int) -> Question:
        """The one that was added as ``number``."""
        start, end = self._ends[number], self._ends[number + 1]
        return Question(*json.loads(os.pread(self._text_file.fileno(), end - start, start)))

    def looks(self, numbers: npt.NDArray[np.int64]) -> Looks:
        """Those that were added as ``numbers``, each read once however often it is asked for."""
        distinct, places = np.unique(numbers, return_inverse=True)
        rows = [os.pread(self._look_file.fileno(), LOOK_BYTES, int(n) * LOOK_BYTES) for n in distinct]
        return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, LOOK_BYTES)[places]
