"""What is kept of a picture to find it again: a hash of its pixels, a perceptual hash, and how it looks when small.

The small look is 64×64 in grey, for strokes as thin as a digit's, and 16×16 in colour. Two looks differ by the greatest
difference of any place, of 255 levels, after one of both was made brighter or darker as a whole: resizing, saving anew
and darkening leave it below 20, a digit or a colour that is another lifts it over 30 as a rule.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from prism_megatron.data.pictures.colours import to_rgb
from prism_megatron.data.pictures.files import open_image
from prism_megatron.data.reading.intake import ImageError

_GREY, _COLOUR = 64, 16
_SIZE_BYTES = 8
_GREY_BYTES = _GREY * _GREY
LOOK_BYTES = _SIZE_BYTES + _GREY_BYTES + 3 * _COLOUR * _COLOUR
_SIDES_FOR_FINER = (96, 192)
"""pixels of the smaller picture's side from which on 32 and 64 places of it are compared, and not 16: where a place has
fewer than three pixels, resizing alone changes it"""
_GAIN = (0.6, 1 / 0.6)
_OFFSET = 80.0

Looks = npt.NDArray[np.uint8]
"""(P, LOOK_BYTES)"""
_Levels = npt.NDArray[np.float32]


class Sketch(NamedTuple):
    """Of one picture."""

    pixels: int
    """hash of 64 bits of its size and its pixels as RGB"""
    perceptual: int
    """hash of 64 bits, of which similar pictures share most"""
    look: bytes
    """``LOOK_BYTES`` long"""


NO_SKETCH = Sketch(0, 0, bytes(LOOK_BYTES))
"""In the place of one of a picture that cannot be read."""


def sketch_picture(path: Path) -> Sketch | str:
    """The sketch of an image file, or why there is none."""
    from imagehash import phash

    try:
        image = to_rgb(open_image(path))
    except ImageError as error:
        return str(error)
    size = np.asarray(image.size, dtype="<u4").tobytes()
    grey = image.convert("L")
    bits = np.packbits(phash(grey).hash.ravel()).tobytes()
    small = [one.resize((side, side), Image.Resampling.BILINEAR) for one, side in ((grey, _GREY), (image, _COLOUR))]
    return Sketch(
        pixels=int.from_bytes(hashlib.blake2b(size + image.tobytes(), digest_size=8).digest(), "little"),
        perceptual=int.from_bytes(bits, "big"),
        look=size + small[0].tobytes() + small[1].tobytes(),
    )


def differences(one: Looks, other: Looks) -> _Levels:
    """Of each of P pairs of looks the greatest difference of any place, in levels of 255. The order does not matter."""
    found = _residual(*(looks[:, _SIZE_BYTES + _GREY_BYTES :] for looks in (one, other)))
    sides = np.minimum(_sides(one), _sides(other))
    grids = np.digitize(sides, _SIDES_FOR_FINER)
    for grid in np.unique(grids, axis=0):
        chosen = (grids == grid).all(axis=1)
        width, height = (_COLOUR << int(finer) for finer in grid)
        found[chosen] = np.maximum(
            found[chosen], _residual(*(_grey(looks[chosen], width, height) for looks in (one, other)))
        )
    return found


def _sides(looks: Looks) -> npt.NDArray[np.uint32]:
    """(P, 2): width and height of the pictures in pixels."""
    return np.ascontiguousarray(looks[:, :_SIZE_BYTES]).view("<u4")


def _grey(looks: Looks, width: int, height: int) -> _Levels:
    """(P, height, width): means of the grey look."""
    levels = looks[:, _SIZE_BYTES : _SIZE_BYTES + _GREY_BYTES].astype(np.float32)
    return np.asarray(levels.reshape(-1, height, _GREY // height, width, _GREY // width).mean(axis=(2, 4)))


def _residual(one: _Levels | Looks, other: _Levels | Looks) -> _Levels:
    first, second = (levels.reshape(len(levels), -1).astype(np.float32) for levels in (one, other))
    return np.minimum(_fitted(first, second), _fitted(second, first))


def _fitted(one: _Levels, other: _Levels) -> _Levels:
    """The greatest difference once ``one`` has the brightness and the contrast of ``other``, as far as light goes."""
    mean, wanted = one.mean(axis=1, keepdims=True), other.mean(axis=1, keepdims=True)
    centred = one - mean
    variance = np.square(centred).mean(axis=1, keepdims=True)
    covariance = (centred * (other - wanted)).mean(axis=1, keepdims=True)
    gain = np.divide(covariance, variance, out=np.ones_like(variance), where=variance > 0).clip(*_GAIN)
    offset = (wanted - gain * mean).clip(-_OFFSET, _OFFSET)
    return np.asarray(np.abs((gain * one + offset).clip(0, 255) - other).max(axis=1))
