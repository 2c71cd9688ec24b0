"""Image files of any kind, from anywhere: a picture, or an ImageError that names the file.

What a decoder raises is an open set (Pillow has about forty, some on C libraries with errors of their own), so whatever
it raises is taken for "this file cannot be read". What only describes a picture (EXIF, XMP, colour profiles) does not
keep it from being read.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import Image, ImageFile

from prism_megatron.data.pictures.colours import eight_bit, to_rgb
from prism_megatron.data.pictures.without_metadata import without_metadata
from prism_megatron.data.reading.intake import ImageError

T = TypeVar("T")

MAX_PIXELS = 64_000_000  # a larger file is refused before it is decoded
PROGRAMS = ("EPS", "WMF")
"""Formats that are drawn by another program, which would run what the file says."""
MAX_THREADS = 8
_BATCH = 1024
_ORIENTATION = 274
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of each EXIF orientation upright (TIFF 6.0, tag 274)."""

# Some formats hold files of another inside, whose size Pillow checks by this bound alone: it refuses twice as much.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2

Stored = Path | bytes
"""An image file as it was stored: where it lies, or all of it."""
IN_THE_RECORD = "the image in the record"
_STREAM = re.compile(r"<_io\.BytesIO object at 0x[0-9a-f]+>")

Seen = tuple[int, int] | str
"""(width, height) in pixels, or why an image cannot be used."""


def open_image(stored: Stored) -> Image.Image:
    """The first picture of an image file, decoded, upright, of 8 bits a colour.

    Raises ImageError, naming the file, for one that cannot be read, is larger than MAX_PIXELS or has no known white.
    """
    return _read(stored, _pixels)


def image_size(stored: Stored) -> tuple[int, int]:
    """(width, height) in pixels from the file's header. Raises ImageError as :func:`open_image`."""
    return _read(stored, lambda image: image.size)


def image_kind(stored: Stored) -> str:
    """Pillow's name of the file's format, such as ``PNG``. Raises ImageError as :func:`open_image`."""
    return _read(stored, lambda image: image.format or "")


def plain_format(stored: Stored) -> str | None:
    """The format, such as ``PNG``, of a file in which every reader sees the same; None for any other.

    It holds one picture, upright, opaque, of 8 bits a colour. All pixels are read. Raises ImageError as
    :func:`open_image`.
    """
    return _read(stored, _plain_format)


def look_at(paths: Sequence[Path], *, pixels: bool, advance: Callable[[int], None] = lambda _count: None) -> list[Seen]:
    """What a check before the first step sees of each file: of its header or, with ``pixels``, of all of it.

    Several at a time; ``advance`` is told of each one that is done, from any thread.
    """

    def look(path: Path) -> Seen:
        try:
            return to_rgb(open_image(path)).size if pixels else image_size(path)
        except ImageError as error:
            return str(error)
        finally:
            advance(1)

    seen: list[Seen] = []
    with _quietly(), ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        for start in range(0, len(paths), _BATCH):
            seen.extend(pool.map(look, paths[start : start + _BATCH]))
    return seen


def _read(stored: Stored, use: Callable[[Image.Image], T]) -> T:
    """``use`` of the opened file; where that fails, of the same file without its metadata, if it has any."""
    name = IN_THE_RECORD if isinstance(stored, bytes) else str(stored)
    try:
        with _quietly():
            try:
                return _opened(io.BytesIO(stored) if isinstance(stored, bytes) else stored, use)
            except ImageError:
                raise
            except Exception:  # a decoder's errors are an open set; raised again below
                bare = without_metadata(stored)
                if bare is None:
                    raise
                return _opened(io.BytesIO(bare), use)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except Exception as error:  # as above
        said = _STREAM.sub("it", str(error).replace(name, "it"))
        reason = " ".join(said.split()) or type(error).__name__
        raise ImageError(f"{name}: the image cannot be read: {reason}") from error


def _opened(source: Path | BinaryIO, use: Callable[[Image.Image], T]) -> T:
    with Image.open(source) as image:
        if image.format in PROGRAMS:
            raise ImageError(f"{image.format} is drawn by a program of its own, which is not run; save it as a PNG")
        _check_size(image)
        return use(image)


def _pixels(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    if isinstance(image, ImageFile.ImageFile):
        # TIFF files read their metadata again once they are decoded, and turn by what they find.
        image.getexif = Image.Exif  # type: ignore[method-assign]
    image.load()
    _check_size(image)  # some formats know their size only now
    upright = eight_bit(image)
    return upright.copy() if turn is None else upright.transpose(turn)


def _plain_format(image: Image.Image) -> str | None:
    is_one = getattr(image, "n_frames", 1) == 1 and _orientation(image) == 1
    is_plain_mode = image.mode in ("1", "L", "P", "RGB") and not image.has_transparency_data
    image.load()
    return image.format if is_one and is_plain_mode else None


def _orientation(image: Image.Image) -> int:
    """As the file has it, however damaged the rest of its metadata is; 1, upright, where it has none."""
    try:
        tags = getattr(image, "tag_v2", None)
        found = image.getexif().get(_ORIENTATION) if tags is None else tags.get(_ORIENTATION)
    except Exception:  # noqa: BLE001  # an open set again; a picture without readable metadata is as it is
        return 1
    return found if isinstance(found, int) else 1


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"an image of {width}x{height} pixels; at most {MAX_PIXELS} pixels are read")
    if not width * height:
        raise ImageError(f"an image of {width}x{height} pixels, which is none")


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Pillow's remarks on sizes and damaged metadata, which would fill the terminal file by file.

    Threads restore each other's filters in any order: who starts some holds one of these around them all.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
