"""What a search for duplicates keeps of every record in memory: about 130 bytes, however long texts and pictures are.

Records are read twice. The first time files and questions are hashed; the second time each picture that is another
file is looked at once. Both is done by processes that load no torch.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prism_megatron.curation.duplicates.bands import BYTES_OF_A_BAND, bands_of, number_of_bands, values_of_a_band
from prism_megatron.curation.duplicates.look import NO_SKETCH, sketch_picture
from prism_megatron.curation.duplicates.scratch import Scratch
from prism_megatron.curation.duplicates.words import answer_of, is_telling, plain_text, shingles_of, words_of
from prism_megatron.data.formats.repeats import id_hash
from prism_megatron.data.records import Record
from prism_megatron.data.workers import in_workers
from prism_megatron.errors import ConfigError, DataError

Records = Callable[[], Iterator[Record]]
"""Gives the same records in the same order, each time anew."""

_AHEAD = 64
_PRELOAD = ("prism_megatron.curation.duplicates.hashes",)


@dataclass(frozen=True)
class Hashes:
    """Of N records: first those of evaluation sets, then the problems; of B bands, and of P pictures."""

    num_evaluation: int
    text_N: npt.NDArray[np.uint64]
    answer_N: npt.NDArray[np.uint64]
    telling_N: npt.NDArray[np.bool_]
    bands_N_B: npt.NDArray[np.uint32]
    picture_N: npt.NDArray[np.int32]
    """the picture's number among those that are another file"""
    pixels_P: npt.NDArray[np.uint64]
    perceptual_P: npt.NDArray[np.uint64]
    unreadable_P: npt.NDArray[np.bool_]
    """pictures that cannot be read, which are like no other"""

    def __len__(self) -> int:
        return len(self.text_N)


class _Asked(NamedTuple):
    """What a process is given of a record."""

    image: Path
    question: str
    answer: str


class _Written(NamedTuple):
    """What it makes of that."""

    content: int
    text: int
    answer: int
    telling: bool
    bands: bytes


def check_installed() -> None:
    """Raise ConfigError where a package of the extra is not there."""
    try:
        import datasketch  # noqa: F401  # whether they are there, before processes ask for them
        import imagehash  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"finding duplicates needs {error.name}: pip install 'prism-megatron[curate]'"
        ) from error  # fmt: skip


def hashes_of(evaluation: Records, problems: Records, scratch: Scratch, *, overlap: float, workers: int) -> Hashes:
    """Read all of them, and leave questions and looks in ``scratch``.

    ``overlap`` is the Jaccard index from which on texts have to share a band. Raises ConfigError without the extra,
    DataError, naming the record, for a file that cannot be opened and an evaluation's picture that cannot be read, and
    DiskError.
    """
    check_installed()
    values = values_of_a_band(overlap)
    content, text, answer = (array("Q") for _ in range(3))
    telling, bands = bytearray(), bytearray()
    num_evaluation = 0

    def kept() -> Iterator[_Asked]:
        nonlocal num_evaluation
        for number, record in enumerate(evaluation(), start=1):
            num_evaluation = number
            scratch.add_question(record)
            yield _asked(record)
        for record in problems():
            scratch.add_question(record)
            yield _asked(record)

    written = in_workers(partial(_write, values=values), kept(), workers=workers, ahead=_AHEAD, preload=_PRELOAD)
    for number, one in enumerate(written):
        if isinstance(one, str):
            scratch.flush()
            raise DataError(f"{scratch.question(number).where}: field image: {one}")
        content.append(one.content)
        text.append(one.text)
        answer.append(one.answer)
        telling.append(one.telling)
        bands += one.bands
    contents, picture = _numbered(_array(content))
    sketches = _sketched(
        chain(evaluation(), problems()), contents, scratch, num_evaluation=num_evaluation, workers=workers
    )
    pixels, perceptual, unreadable = sketches
    num_bands = number_of_bands(values)
    assert len(bands) == len(text) * num_bands * BYTES_OF_A_BAND
    return Hashes(
        num_evaluation=num_evaluation,
        text_N=_array(text),
        answer_N=_array(answer),
        telling_N=np.frombuffer(bytes(telling), dtype=np.bool_),
        bands_N_B=np.frombuffer(bytes(bands), dtype="<u4").reshape(-1, num_bands),
        picture_N=picture,
        pixels_P=_array(pixels),
        perceptual_P=_array(perceptual),
        unreadable_P=np.frombuffer(bytes(unreadable), dtype=np.bool_),
    )


def _asked(record: Record) -> _Asked:
    return _Asked(record.image, record.question_text, answer_of(record))


def _write(asked: _Asked, *, values: int) -> _Written | str:
    """The hashes of one record, or why its file cannot be read."""
    try:
        with asked.image.open("rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).digest()
    except OSError as error:
        return f"{asked.image} cannot be read: {error.strerror or error}"
    return _Written(
        content=int.from_bytes(content, "little"),
        text=id_hash(plain_text(asked.question)),
        answer=id_hash(asked.answer),
        telling=is_telling(asked.answer),
        bands=bands_of(shingles_of(words_of(asked.question)), values),
    )


def _numbered(content_N: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """(the first record of every content, in order; of every record the number of its content in that order)."""
    _, first, inverse = np.unique(content_N, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty(len(order), dtype=np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    return first[order], number[inverse]


def _sketched(
    records: Iterator[Record],
    first_P: npt.NDArray[np.int64],
    scratch: Scratch,
    *,
    num_evaluation: int,
    workers: int,
) -> tuple[array[int], array[int], bytearray]:
    """Look at the pictures of the records ``first_P``. Raises DataError as :func:`hashes_of`."""
    pixels, perceptual, unreadable = array("Q"), array("Q"), bytearray()
    scratch.flush()

    def chosen() -> Iterator[Path]:
        wanted = iter(first_P.tolist())
        next_one = next(wanted, None)
        for number, record in enumerate(records):
            if number == next_one:
                if scratch.question(number).id != record.id:
                    raise DataError(f"{record.where}: the records changed while they were read; begin anew")
                yield record.image
                next_one = next(wanted, None)

    sketches = in_workers(sketch_picture, chosen(), workers=workers, ahead=_AHEAD, preload=_PRELOAD)
    for number, found in enumerate(sketches):
        if isinstance(found, str) and first_P[number] < num_evaluation:
            raise DataError(f"{scratch.question(int(first_P[number])).where}: field image: {found}")
        sketch = NO_SKETCH if isinstance(found, str) else found
        unreadable.append(sketch is NO_SKETCH)
        pixels.append(sketch.pixels)
        perceptual.append(sketch.perceptual)
        scratch.add_look(sketch.look)
    scratch.flush()
    return pixels, perceptual, unreadable


def _array(values: array[int]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(values, dtype=np.uint64) if values else np.zeros(0, dtype=np.uint64)
