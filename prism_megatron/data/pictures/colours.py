"""From any of Pillow's modes to 8-bit RGB, without a picture that comes out black or white because of its numbers.

Levels of more than 8 bits and floats have no white of their own in Pillow, whose conversion clips at 255. The rule:

* 16 bits (``I;16`` and its kin, and ``I`` from a portable graymap): 65535 is white; 4095 in a 12-bit TIFF.
* 32-bit integers: levels of 256 to 65535 are 16-bit ones in a wider place, so 65535 is white. Where all are below 256
  nobody knows which white is meant, and beyond 65535, or below 0, neither: refused.
* floats: 0 is black and 1 is white; anything beyond is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from prism_megatron.data.reading.intake import ImageError

_WHITE_8, _WHITE_12, _WHITE_16 = 255, 4095, 65535
_BITS_PER_SAMPLE = 258
_SAVE_AS = "save it with 8 or 16 bits a colour, such as a PNG"


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency over white (as transformers does), deeper greys scaled as the rule above says.

    Raises ImageError for levels that have no known white.
    """
    image = eight_bit(image)
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(background, _with_alpha(image))
    return image.convert("RGB")


def eight_bit(image: Image.Image) -> Image.Image:
    """Modes of deeper greys as ``L``, by the rule above; any other image as it is. Raises ImageError as :func:`to_rgb`.

    To be asked before an image is turned: only as it was opened it says of which format it is.
    """
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.int64)
        return _scaled(levels, _WHITE_12 if _bits(image) == (12,) else _WHITE_16, image)
    if image.mode == "I":
        return _from_integers(np.asarray(image).astype(np.int64), image)
    if image.mode == "F":
        return _from_floats(np.asarray(image))
    return image


def _from_integers(levels: npt.NDArray[np.int64], image: Image.Image) -> Image.Image:
    least, most = int(levels.min(initial=0)), int(levels.max(initial=0))
    if least < 0 or most > _WHITE_16:
        raise ImageError(f"its 32-bit levels go from {least} to {most}, and only 0 to 65535 are read; {_SAVE_AS}")
    if 0 < most <= _WHITE_8 and image.format != "PPM":
        raise ImageError(
            f"its 32-bit levels go to {most} only, and whether 255 or 65535 is white is not known; {_SAVE_AS}"
        )
    return _scaled(levels, _WHITE_16, image)


def _from_floats(levels: npt.NDArray[np.float32]) -> Image.Image:
    least, most = float(levels.min(initial=0.0)), float(levels.max(initial=0.0))
    if not (least >= 0.0 and most <= 1.0):  # written so that a NaN is refused
        raise ImageError(
            f"its floats go from {least:g} to {most:g}, and only 0 (black) to 1 (white) are read; {_SAVE_AS}"
        )
    return Image.fromarray(np.rint(levels * np.float32(_WHITE_8)).astype(np.uint8))


def _scaled(levels: npt.NDArray[np.int64], white: int, image: Image.Image) -> Image.Image:
    """``levels`` of which ``white`` is white, rounded to 8 bits; a level that stands for transparency becomes white."""
    scaled = (levels.clip(max=white) * _WHITE_8 + white // 2) // white
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled[levels == transparent] = _WHITE_8
    return Image.fromarray(scaled.astype(np.uint8))


def _bits(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE)


def _with_alpha(image: Image.Image) -> Image.Image:
    """``RGBA``, also from modes that Pillow converts by way of another one only."""
    return image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
