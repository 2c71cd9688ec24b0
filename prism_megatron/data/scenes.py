"""The built-in world: small rendered scenes whose caption, reasoning and answer are known exactly.

A scene is 96x96 pixels in 3x3 cells of 32 pixels, one shape per cell, on grey (which normalises to 0). Two or three
kinds (colour and shape) appear one to three times each, and one question is asked about them. The mini worlds differ in
what is asked, and in who writes about it (``data.teachers``).

Everything is a pure function of (world, split, seed, index): no global random state, so every rank, every resumed run
and every machine sees the same scene. Splits never share a (content, question) pair: each pair is hashed into one of 16
buckets, and a split draws only from its own buckets.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, cast

import numpy as np
from PIL import Image, ImageDraw

from prism_megatron.config.architecture.model import MiniWorld

Split = Literal["pretrain", "sft", "align", "heldout"]
QuestionKind = Literal["count", "sum2", "sum3", "difference", "comparison"]

IMAGE_SIZE = 96
CELL_SIZE = 32
CELLS_PER_SIDE = IMAGE_SIZE // CELL_SIZE
BACKGROUND = (128, 128, 128)
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 225), "yellow": (235, 210, 50)}
SHAPES = ("circle", "square", "triangle")
QUESTION_KINDS: tuple[QuestionKind, ...] = ("count", "sum2", "sum3", "difference", "comparison")
DRIFT_QUESTIONS: dict[QuestionKind, float] = {"count": 0.25, "sum2": 0.25, "sum3": 0.2, "comparison": 0.3}
"""How often the world ``drift`` draws each; ``habits`` draws all alike. No difference is among them: the larger count
stands first in it, which tells of counts without a picture."""

NUM_BUCKETS = 16
BUCKETS: dict[Split, range] = {
    "pretrain": range(8),
    "sft": range(8, 11),
    "align": range(11, 14),
    "heldout": range(14, 16),
}
_SCENE_ID = re.compile(rf"scene-(?:(drift)-)?({'|'.join(BUCKETS)})-(\d{{1,18}})-(\d{{1,18}})", re.ASCII)
THREE_KINDS_SHARE = 0.65
ABSENT_KIND_SHARE = 0.15


class Kind(NamedTuple):
    """What a shape is: the unit that captions list and questions count."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def plural(self) -> str:
        return f"{self}s"


ALL_KINDS = tuple(Kind(colour, shape) for colour in COLOURS for shape in SHAPES)


class Placement(NamedTuple):
    """One drawn shape: centre and radius in pixels, its exact colour."""

    kind: Kind
    x: int
    y: int
    radius: int
    rgb: tuple[int, int, int]


class Question(NamedTuple):
    """What is asked. ``operands`` are the kinds to count, in the order of the question's text."""

    kind: QuestionKind
    operands: tuple[Kind, ...]

    @property
    def text(self) -> str:
        names = [kind.plural for kind in self.operands]
        if self.kind == "difference":
            return f"How many more {names[0]} than {names[1]} are there?"
        if self.kind == "comparison":
            return f"Are there more {names[0]} than {names[1]}?"
        return f"How many {' and '.join(names)} are there?"


@dataclass(frozen=True)
class Scene:
    """One scene and its question. ``counts`` are in canonical order (colour first, then shape).

    Example: counts ((red circle, 2), (blue square, 1)) asked "How many red circles are there?" answers "2".
    """

    split: Split
    seed: int
    index: int
    counts: tuple[tuple[Kind, int], ...]
    question: Question
    placements: tuple[Placement, ...]
    world: MiniWorld = "habits"

    @property
    def id(self) -> str:
        world = "" if self.world == "habits" else f"{self.world}-"
        return f"scene-{world}{self.split}-{self.seed}-{self.index}"

    @cached_property
    def count_of(self) -> dict[Kind, int]:
        return dict.fromkeys(ALL_KINDS, 0) | dict(self.counts)

    @property
    def operand_counts(self) -> tuple[int, ...]:
        return tuple(self.count_of[kind] for kind in self.question.operands)

    @property
    def answer(self) -> str:
        return evaluate(self.question.kind, self.operand_counts)

    def image(self) -> Image.Image:
        """The RGB picture, 96x96 pixels."""
        picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND)
        draw = ImageDraw.Draw(picture)
        for kind, x, y, radius, rgb in self.placements:
            left, top, right, bottom = x - radius, y - radius, x + radius - 1, y + radius - 1  # PIL includes the last
            if kind.shape == "circle":
                draw.ellipse((left, top, right, bottom), fill=rgb)
            elif kind.shape == "square":
                draw.rectangle((left, top, right, bottom), fill=rgb)
            else:
                draw.polygon([(x, top), (left, bottom), (right, bottom)], fill=rgb)
        return picture


def evaluate(kind: QuestionKind, counts: tuple[int, ...]) -> str:
    """The answer to a question of this kind when its operands have these counts."""
    if kind == "comparison":
        return "yes" if counts[0] > counts[1] else "no"
    if kind == "difference":
        return str(counts[0] - counts[1])
    return str(sum(counts))


def keyed_generator(*key: str | int) -> np.random.Generator:
    """A counter-based generator that depends on ``key`` alone."""
    digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def make_scene(split: Split, *, seed: int, index: int, world: MiniWorld = "habits") -> Scene:
    """Scene number ``index`` of an endless split. The same arguments give the same scene everywhere."""
    rng = keyed_generator("scene" if world == "habits" else f"scene of {world}", split, seed, index)
    while True:
        counts = _draw_counts(rng)
        question = _draw_question(rng, dict(counts), world)
        if content_bucket(counts, question) in BUCKETS[split]:
            return Scene(split, seed, index, counts, question, _draw_placements(rng, counts), world)


def scene_of(scene_id: str) -> Scene | None:
    """The scene that has this id; None for what is no scene's id."""
    match = _SCENE_ID.fullmatch(scene_id)
    if match is None:
        return None
    world, split, seed, index = match.groups()
    return make_scene(
        cast(Split, split), seed=int(seed), index=int(index), world=cast(MiniWorld, world) if world else "habits"
    )


def content_bucket(counts: tuple[tuple[Kind, int], ...], question: Question) -> int:
    """The bucket that alone may show this content with this question; the layout plays no part."""
    content = ";".join(f"{kind}:{count}" for kind, count in counts) + "|" + question.text
    return hashlib.blake2b(content.encode(), digest_size=8).digest()[0] % NUM_BUCKETS


def _draw_counts(rng: np.random.Generator) -> tuple[tuple[Kind, int], ...]:
    num_kinds = 3 if rng.random() < THREE_KINDS_SHARE else 2
    chosen = sorted(int(i) for i in rng.permutation(len(ALL_KINDS))[:num_kinds])
    return tuple((ALL_KINDS[i], int(rng.integers(1, 4))) for i in chosen)


def _draw_question(rng: np.random.Generator, counts: dict[Kind, int], world: MiniWorld) -> Question:
    present = [list(counts)[int(i)] for i in rng.permutation(len(counts))]
    kind = _draw_question_kind(rng, world)
    if kind == "sum3" and len(present) < 3:
        kind = "sum2"
    operands = present[: {"count": 1, "sum3": 3}.get(kind, 2)]
    if kind != "difference" and rng.random() < ABSENT_KIND_SHARE:
        absent = [candidate for candidate in ALL_KINDS if candidate not in counts]
        operands[int(rng.integers(len(operands)))] = absent[int(rng.integers(len(absent)))]
    if kind == "difference":  # the larger first: no negative answers
        operands.sort(key=lambda operand: -counts[operand])
    return Question(kind, tuple(operands))


def _draw_question_kind(rng: np.random.Generator, world: MiniWorld) -> QuestionKind:
    if world == "habits":
        return QUESTION_KINDS[int(rng.integers(len(QUESTION_KINDS)))]
    return list(DRIFT_QUESTIONS)[int(rng.choice(len(DRIFT_QUESTIONS), p=list(DRIFT_QUESTIONS.values())))]


def _draw_placements(rng: np.random.Generator, counts: tuple[tuple[Kind, int], ...]) -> tuple[Placement, ...]:
    cells = iter(int(cell) for cell in rng.permutation(CELLS_PER_SIDE**2))
    placements = []
    for kind, count in counts:
        for _ in range(count):
            row, column = divmod(next(cells), CELLS_PER_SIDE)
            dx, dy = (int(v) for v in rng.integers(-4, 5, size=2))
            radius = int(rng.integers(8, 13))
            shift = rng.integers(-15, 16, size=3)
            red, green, blue = (int(np.clip(c + s, 0, 255)) for c, s in zip(COLOURS[kind.colour], shift, strict=True))
            x, y = (CELL_SIZE // 2 + CELL_SIZE * column + dx, CELL_SIZE // 2 + CELL_SIZE * row + dy)
            placements.append(Placement(kind, x, y, radius, (red, green, blue)))
    return tuple(placements)
