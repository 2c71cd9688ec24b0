"""Every mode becomes 8-bit RGB as it looks, or is refused by name: never black or white because of its numbers."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prism_megatron.data.pictures.colours import to_rgb
from prism_megatron.data.pictures.files import open_image
from prism_megatron.errors import DataError

RAMP = np.linspace(0, 1, 256)[None, :].repeat(4, axis=0)
"""From black to white; the mean is half of white."""


def opened(folder: Path, data: bytes) -> Image.Image:
    (folder / "x.bin").write_bytes(data)
    return to_rgb(open_image(folder / "x.bin"))


def saved(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=name, **options)
    return buffer.getvalue()


def levels(kind: type, white: float) -> Image.Image:
    return Image.fromarray(np.rint(RAMP * white).astype(kind) if white > 1 else RAMP.astype(kind))


def tiff_of_12_bits() -> bytes:
    """Two grey pixels, black and white, of 12 bits each."""
    tags = [
        (256, 3, 2),
        (257, 3, 1),
        (258, 3, 12),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 200),
        (277, 3, 1),
        (278, 3, 1),
        (279, 4, 3),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + b"\x00\x0f\xff"


@pytest.mark.parametrize(
    "data",
    [
        b"P5 256 4 65535\n" + np.rint(RAMP * 65535).astype(">u2").tobytes(),
        saved(levels(np.uint16, 65535), "PNG"),
        saved(levels(np.uint16, 65535), "TIFF"),
        saved(levels(np.uint16, 65535), "JPEG2000"),
        saved(levels(np.int32, 65535), "TIFF"),
        saved(levels(np.float32, 1), "TIFF"),
        saved(levels(np.uint8, 255), "PNG"),
    ],
    ids=["graymap", "png", "tiff", "jpeg2000", "int32", "float", "8 bits"],
)
def test_a_ramp_stays_a_ramp(data: bytes, tmp_path: Path) -> None:
    """Claim: every level within one of 255; half of it is darker than half of white."""
    grey = np.asarray(opened(tmp_path, data))[0, :, 0].astype(int)
    assert np.abs(grey - np.arange(256)).max() <= 1
    assert (grey.min(), grey.max()) == (0, 255)


def test_12_bits_have_their_own_white(tmp_path: Path) -> None:
    assert np.asarray(opened(tmp_path, tiff_of_12_bits()))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (levels(np.int32, 255), "its 32-bit levels go to 255 only, and whether 255 or 65535 is white is not known"),
        (levels(np.int32, 65536), "its 32-bit levels go from 0 to 65536, and only 0 to 65535 are read"),
        (Image.fromarray(np.array([[-1, 300]], dtype=np.int32)), "go from -1 to 300"),
        (levels(np.float32, 255), "its floats go from 0 to 255, and only 0 (black) to 1 (white) are read"),
        (Image.fromarray(np.array([[0.5, -0.1]], dtype=np.float32)), "go from -0.1 to 0.5"),
        (Image.fromarray(np.array([[0.5, np.nan]], dtype=np.float32)), "nan"),
        (Image.fromarray(np.array([[0.5, np.inf]], dtype=np.float32)), "inf"),
    ],
)
def test_levels_without_a_known_white_are_refused(image: Image.Image, reason: str, tmp_path: Path) -> None:
    (tmp_path / "deep.tif").write_bytes(saved(image, "TIFF"))
    with pytest.raises(DataError) as caught:
        open_image(tmp_path / "deep.tif")
    assert reason in str(caught.value) and str(caught.value).startswith(f"{tmp_path / 'deep.tif'}: ")
    assert "PNG" in str(caught.value), "what to do is said"


def test_a_dark_graymap_of_16_bits_is_dark(tmp_path: Path) -> None:
    """Its white is known, also where no level comes near it."""
    data = b"P5 2 1 65535\n" + np.array([0, 200], dtype=">u2").tobytes()
    assert np.asarray(opened(tmp_path, data))[0, :, 0].tolist() == [0, 1]


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_what_is_transparent_is_white(mode: str) -> None:
    """Two pixels, one black and one that is not there."""
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    for step in {"La": ("LA", "La"), "LA": ("LA",), "RGBa": ("RGBa",)}.get(mode, ()):
        image = image.convert(step)
    if mode == "PA":  # converted to, it has no transparency
        image = Image.new("PA", (2, 1))
        image.putpixel((0, 0), (0, 255))
        image.putpixel((1, 0), (0, 0))
    assert image.mode == mode
    assert np.asarray(to_rgb(image)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_transparent_colours_and_levels_are_white(tmp_path: Path) -> None:
    """Palettes and greys, of 8 and of 16 bits, name one entry or level that is not there."""
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    grey = Image.fromarray(np.array([[0, 9]], dtype=np.uint8))
    deep = Image.fromarray(np.array([[0, 9 * 257]], dtype=np.uint16))
    for image, level in ((palette, 1), (grey, 9), (deep, 9 * 257)):
        pixels = np.asarray(opened(tmp_path, saved(image, "PNG", transparency=level)))
        assert pixels.tolist() == [[[0, 0, 0], [255, 255, 255]]], image.mode


def test_of_several_frames_the_first_is_read(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    for name in ("GIF", "PNG", "TIFF", "WEBP", "MPO"):
        pixels = np.asarray(opened(tmp_path, saved(first, name, save_all=True, append_images=[second])))
        assert pixels[0, 0, 0] > 200 and pixels[0, 0, 2] < 60, name


@pytest.mark.parametrize("name", ["grey16.pgm", "grey32.tif", "grey_float.tif"])
def test_deep_greys_from_reports_are_as_bright_as_they_were(name: str, shared_dir: Path) -> None:
    path = shared_dir / "cases" / name
    if not path.is_file():
        pytest.skip("the shared data have no cases")
    assert abs(np.asarray(to_rgb(open_image(path))).mean() - 127.5) < 1
