"""Images as sets store them: paths inside the set's folder, bytes, or a struct of both. Pixels are not read here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from prism_megatron.data.conversation import Picture
from prism_megatron.data.formats.files.reading import Reading
from prism_megatron.data.pictures.files import image_kind, image_size, open_image
from prism_megatron.data.reading.fields import check_text, image_path
from prism_megatron.data.reading.intake import ImageError
from prism_megatron.errors import DataError

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif", "pgm", "ppm")
_STRUCT = ("bytes", "path")


def pictures_in(value: Any, *, where: str, reading: Reading) -> tuple[Picture, ...]:
    """None, one image or a list of them. Raises DataError, naming ``where``, for what is no image of this set."""
    if value is None or value in ([], ""):
        return ()
    return tuple(_picture(one, where, reading) for one in (value if isinstance(value, list) else [value]))


def _picture(value: Any, where: str, reading: Reading) -> Picture:
    if isinstance(value, dict) and value and set(value) <= set(_STRUCT):
        data = value.get("bytes")
        value = value.get("path") if data is None else data
    if isinstance(value, bytes) and value:
        return Picture(value)
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{where}: field image: a path, bytes, or an object with bytes and path expected, "
            f"not {type(value).__name__} {str(value)[:40]!r}"
        )
    check_text(value, "image", where)
    if "://" in value or value.startswith("data:"):
        raise DataError(
            f"{where}: field image: {value[:60]!r} is no file of the set; download it and give the path, or the bytes"
        )
    return Picture(image_path(value, reading.folder, where))


def shown(pictures: Sequence[Picture]) -> str:
    """``1 image`` or ``3 images``."""
    return f"{len(pictures)} image{'' if len(pictures) == 1 else 's'}"


def size_of(picture: Picture, *, where: str) -> tuple[int, int]:
    """(width, height) in pixels, from the header. Raises DataError, naming ``where``, if it cannot be read."""
    try:
        return image_size(picture.stored)
    except ImageError as error:
        raise ImageError(f"{where}: field image: {error}") from error


def decoded(picture: Picture, *, where: str) -> Image.Image:
    """The image with all its pixels, as training reads it. Raises DataError, naming ``where``, if that fails."""
    try:
        return open_image(picture.stored)
    except ImageError as error:
        raise ImageError(f"{where}: field image: {error}") from error


def extension_of(picture: Picture, *, where: str) -> str:
    """What the file is called by its first bytes: ``png``, ``jpg``, …  Raises DataError if it is no image."""
    try:
        kind = image_kind(picture.stored).lower()
    except ImageError as error:
        raise ImageError(f"{where}: field image: {error}") from error
    extension = {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}.get(kind, kind)
    if extension not in EXTENSIONS:
        raise DataError(f"{where}: field image: of kind {kind or 'unknown'}; write it as {EXTENSIONS[0]}")
    return extension


def data_of(picture: Picture, *, where: str) -> bytes:
    """The bytes of the image's file. Raises DataError if it cannot be read."""
    stored = picture.stored
    if isinstance(stored, bytes):
        return stored
    try:
        return stored.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: field image: {stored} cannot be read: {error.strerror or error}") from error
