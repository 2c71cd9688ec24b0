"""Which questions are asked, in which order and in which batches: records of sets, and scenes of the mini world."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from prism_megatron.config.architecture.model import MiniWorld
from prism_megatron.config.tools.evaluate import SCENES, Which
from prism_megatron.data.pictures.files import open_image
from prism_megatron.data.records import Record, in_part, read_records
from prism_megatron.data.scenes import Scene, make_scene
from prism_megatron.errors import DataError
from prism_megatron.evaluation.benchmark.answers import Item

VALIDATION_SHARE = 0.1
"""That which training on a folder holds out by default."""
_DIGEST_LENGTH = 16


@dataclass(frozen=True)
class Question:
    """One question with what is right. Exactly one of ``record`` and ``scene`` is where its image comes from."""

    item: Item
    text: str
    """as it is asked, choices as lettered lines"""
    gold: str
    answer_type: str | None = None
    record: Record | None = None
    scene: Scene | None = None

    def image(self) -> Image.Image:
        """Read, or drawn, now. Raises ImageError, naming the line, for a file that cannot be read."""
        if self.scene is not None:
            return self.scene.image()
        assert self.record is not None
        return open_image(self.record.image)


@dataclass(frozen=True)
class Batch:
    """Questions of one set that are asked together; ``number`` counts the batches of the set."""

    number: int
    questions: Sequence[Question]

    def key(self, mode: str) -> int:
        """What their draws are keyed by: neither other sets nor ``--limit`` nor a restart changes it."""
        text = f"{self.questions[0].item.set}|{self.number}|{mode}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def read_questions(
    folders: Sequence[Path], *, part: Which, limit: int | None, scenes: int, seed: int, mini: MiniWorld = "habits"
) -> list[Question]:
    """Those of all folders in the order of their lines, then scenes of a mini world.

    Raises DataError for a malformed set, an image that cannot be read, or where nothing is left.
    """
    found: list[Question] = []
    for folder in folders:
        records = read_records(folder, purpose="evaluate")
        if part == "validation":
            records = tuple(one for one in records if in_part(one, part, validation_share=VALIDATION_SHARE))
        if not records:
            raise DataError(f"--data {folder}: none of its records is held out for validation; ask --part all")
        found += [_of_record(record, folder.resolve().name) for record in records[:limit]]
    # Those that prism-rlvr holds out for the same seed.
    made = (make_scene("heldout", seed=seed, index=index, world=mini) for index in range(scenes))
    return [*found, *map(_of_scene, made)]


def batches_of(questions: Sequence[Question], size: int) -> list[Batch]:
    """In order; no batch has questions of two sets."""
    found: list[Batch] = []
    start = 0
    while start < len(questions):
        name = questions[start].item.set
        own = [one for one in questions[start : start + size] if one.item.set == name]
        is_first = not found or found[-1].questions[0].item.set != name
        found.append(Batch(0 if is_first else found[-1].number + 1, own))
        start += len(own)
    return found


def digest_of(questions: Sequence[Question]) -> str:
    """Of all questions in their order, with images and what is right."""
    digests = [[one.item.set, one.item.id, one.item.digest] for one in questions]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _of_record(record: Record, name: str) -> Question:
    try:
        image = hashlib.sha256(record.image.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{record.where}: field image: {record.image} cannot be read: {error.strerror}") from error
    text, answer_type = record.question_text, record.answer_type
    digest = _digest(text, record.answer, answer_type, image)
    kind = answer_type or "not said"
    item = Item(name, record.id, digest, kind=kind, source=record.source, difficulty=record.difficulty)
    return Question(item, text, record.answer, answer_type, record=record)


def _of_scene(scene: Scene) -> Question:
    text = scene.question.text
    # The id decides on the picture.
    item = Item(SCENES, scene.id, _digest(text, scene.answer, None, scene.id), scene.question.kind, source=SCENES)
    return Question(item, text, scene.answer, scene=scene)


def _digest(text: str, gold: str, answer_type: str | None, image: str) -> str:
    return hashlib.sha256(json.dumps([text, gold, answer_type, image]).encode()).hexdigest()[:_DIGEST_LENGTH]
