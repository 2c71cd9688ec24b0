"""The last step: two folders in the form ours, for fine-tuning and for alignment and RL, and where records come from.

A record has the question, the image's own file and the right answer of the pool, the caption and the solution of the
teacher. ``provenance.jsonl`` has a line for each record, in the same order.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from prism_megatron.curation.files import Row, path_of, rows_of
from prism_megatron.curation.pool import FILE
from prism_megatron.curation.split import ALIGN, SFT
from prism_megatron.data.conversation import Picture
from prism_megatron.data.formats.pictures import extension_of
from prism_megatron.data.formats.write.new_folder import new_folder
from prism_megatron.disk import write_atomically, writing
from prism_megatron.errors import DataError

PROVENANCE = "provenance.jsonl"
WRITTEN = "6-write.json"
"""Says that both folders are whole."""
SETS = (SFT, ALIGN)


class SetWriter:
    """Adds records to a folder that is empty at first; ``close`` when the last one was added."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.count = 0
        (folder / "images").mkdir()
        self._data: IO[str] = (folder / FILE).open("w", encoding="utf-8")
        self._provenance: IO[str] = (folder / PROVENANCE).open("w", encoding="utf-8")

    def add(self, row: Row) -> None:
        """Raises DataError where the image is no longer what it was, OSError where the disk takes no more."""
        problem = row.problem
        where = f"{problem.folder}/{FILE}:{problem.line}"
        stored = problem.image_path.read_bytes()
        name = f"images/{self.count:09d}.{extension_of(Picture(stored), where=where)}"
        (self._folder / name).write_bytes(stored)
        self.count += 1
        self._data.write(json.dumps(_record(row, name), ensure_ascii=False) + "\n")
        self._provenance.write(json.dumps(_provenance(row), ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._data.close()
        self._provenance.close()


def write_sets(folder: Path, source: Path) -> dict[str, int]:
    """Write the rows of the split's file into ``folder``, and count them by set; one without records is not written.

    Raises DataError for an image that is gone, DiskError for what the disk does not take.
    """
    counts: Counter[str] = Counter(row.found["split"]["to"] for row in rows_of(source))
    # What lies there without the mark is of a command that was killed between the two.
    for name in SETS:
        with writing(folder / name):
            shutil.rmtree(folder / name, ignore_errors=True)
    with ExitStack() as held:
        writers: dict[str, SetWriter] = {}
        for name in SETS:
            if counts[name]:
                writers[name] = SetWriter(held.enter_context(new_folder(folder / name)))
                held.callback(writers[name].close)
        for row in rows_of(source):
            try:
                writers[row.found["split"]["to"]].add(row)
            except FileNotFoundError as error:
                raise DataError(f"{row.problem.image}: the image is gone; put it back, and the same command goes on") \
                    from error  # fmt: skip
    path = folder / WRITTEN
    with writing(path):
        write_atomically(path, f"{json.dumps({name: counts[name] for name in SETS})}\n")
    return {name: counts[name] for name in SETS}


def split_file(folder: Path) -> Path:
    """Where the rows of the step before lie."""
    return path_of(folder, "split")


def _record(row: Row, image: str) -> dict[str, Any]:
    problem, answer = row.problem, row.found["answer"]
    fields = {
        "id": problem.id,
        "image": image,
        "question": problem.question,
        "choices": problem.choices,
        "answer": problem.answer,
        "answer_type": problem.answer_type,
        "solution": answer["solution"],
        "caption": answer["caption"],
        "source": problem.source,
    }
    return fields | ({} if problem.difficulty is None else {"difficulty": problem.difficulty})


def _provenance(row: Row) -> dict[str, Any]:
    problem, found = row.problem, row.found
    answer = found["answer"]
    (last,) = [note for note in answer["calls"] if note["outcome"] == "right" and "phase" in note]
    return {
        "id": problem.id,
        "folder": problem.folder,
        "line": problem.line,
        "picture": problem.picture,
        "teacher": last["model"],
        "prompt": last["prompt"],
        "key": last["key"],
        "attempts": answer["attempts"],
        "unaided": answer["unaided"],
        "answered": answer["answered"],
        "pass_rate": found.get("select", {}).get("pass_rate"),
        "score": found["split"]["score"],
        "calls": {step: [_short(note) for note in one["calls"]] for step, one in found.items() if one.get("calls")},
    }


def _short(note: Mapping[str, Any]) -> dict[str, Any]:
    """A note without what only the page shows."""
    names = ("role", "model", "prompt", "number", "key", "outcome", "detail", "phase", "ruling")
    return {name: note[name] for name in names if name in note}
