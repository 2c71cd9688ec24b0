"""Problems that were changed in a known way, to be found again: pictures and questions of real and of drawn ones."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageEnhance

from prism_megatron.curation.duplicates.step import Verdict
from prism_megatron.data.pictures.colours import to_rgb
from prism_megatron.data.pictures.files import open_image
from prism_megatron.data.records import Record
from prism_megatron.data.scenes import make_scene

_OTHER_WORDS = (
    (r"^Look at the table\. Then answer the question\. ", "Use the data shown. "),
    (r"^Is the following statement about the image true or false\? Statement: ", "True or false, in this picture: "),
    (
        r"^What is the missing (\w+) of the part denoted with a question mark\?",
        r"Which \1 belongs at the question mark?",
    ),
    (r"^What is the missing (\w+) if the part denoted", r"Which \1 is hidden when the part that is marked"),
    (r"^How many (.*) are there\?", r"Count the \1 and give their number."),
    (r"\bhow much money\b", "what sum"),
    (r"\bhow much\b", "what amount"),
    (r"\bhow many\b", "what number of"),
    (r"\bWhat is\b", "Find"),
    (r"\bdid\b", "could one say that"),
    (r"\bdoes\b", "is it so that"),
)
"""Each is tried; what stands in a problem's own words is left as it is."""


def record(folder: Path, name: str, image: Image.Image, question: str, answer: str, **fields: object) -> Record:
    """A problem of its own picture, which is written below ``folder``."""
    path = folder / f"{name}.png"
    image.save(path)
    made = Record(name, path, question, None, answer, None, None, "made", where=f"made.jsonl:{name}")
    return replace(made, **fields)  # type: ignore[arg-type]  # what the caller wants otherwise


def scenes(folder: Path, count: int, *, first: int = 0) -> list[Record]:
    """Problems of the built-in world, each with its own picture."""
    drawn = [make_scene("sft", seed=5, index=first + i) for i in range(count)]
    return [record(folder, one.id, one.image(), one.question.text, one.answer) for one in drawn]


def said_otherwise(question: str) -> str:
    """The same question in other words."""
    said = question
    for pattern, other in _OTHER_WORDS:
        said = re.sub(pattern, other, said, flags=re.IGNORECASE)
    return f"{said} Give a short answer."


def _resized(image: Image.Image, draw: random.Random) -> Image.Image:
    scale = draw.choice((0.4, 0.6, 0.8, 1.3, 1.9))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, draw.choice((Image.Resampling.LANCZOS, Image.Resampling.BILINEAR)))


def _brightness(image: Image.Image, draw: random.Random) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(draw.choice((0.7, 0.8, 0.9, 1.1, 1.2)))


def _cropped(image: Image.Image, draw: random.Random) -> Image.Image:
    share = draw.choice((0.02, 0.05, 0.1, 0.2))
    across, down = (int(side * share * draw.random()) for side in image.size)
    width, height = (int(side * (1 - share)) for side in image.size)
    return image.crop((across, down, across + width, down + height))


def _same(image: Image.Image, draw: random.Random) -> Image.Image:
    del draw
    return image


PICTURES: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "resized": _resized,
    "as a JPEG": _same,
    "as a PNG": _same,
    "brightness": _brightness,
    "other words": _same,
    "cropped": _cropped,
}


def plant(folder: Path, original: Record, kind: str, draw: random.Random) -> Record:
    """A copy of ``original`` that was changed as ``kind`` says, in a file of its own."""
    image = PICTURES[kind](to_rgb(open_image(original.image)), draw)
    path = folder / f"planted-{original.id}.{'jpg' if kind == 'as a JPEG' else 'png'}"
    if kind == "as a JPEG":
        image.save(path, quality=draw.choice((30, 50, 75, 90)))
    else:
        image.save(path, compress_level=draw.choice((0, 9)))
    question = said_otherwise(original.question) if kind == "other words" else original.question
    return replace(original, id=f"planted-{original.id}", image=path, question=question)


def giving(records: Sequence[Record]) -> Callable[[], Iterator[Record]]:
    """The records as a search for duplicates takes them."""
    return lambda: iter(records)


def by_id(records: Sequence[Record], verdicts: Sequence[Verdict]) -> dict[str, Verdict]:
    """Every record's verdict."""
    assert [one.position for one in verdicts] == list(range(len(records)))
    return {one.id: verdict for one, verdict in zip(records, verdicts, strict=True)}
