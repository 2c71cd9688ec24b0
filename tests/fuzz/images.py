"""Image files of every format that Pillow here writes or opens, damaged in pixels, headers, EXIF, ICC and XMP."""

from __future__ import annotations

import functools
import io
import random
import struct
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prism_megatron.data.pictures.colours import to_rgb
from prism_megatron.data.pictures.files import image_size, open_image
from tests.fuzz.damage import damaged
from tests.fuzz.harness import Case, Kind

SIZE = (24, 16)
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F")
_NOT_WRITTEN = {"PDF", "PALM", "BUFR", "GRIB", "HDF5", "WMF"}  # documents, and formats that others have to write
_OPTIONS: Mapping[str, list[dict[str, Any]]] = {
    "TIFF": [{"compression": name} for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4",
                                                "zstd", "webp", "lzma")],
    "PNG": [{}, {"interlace": 1}],
    "JPEG": [{}, {"progressive": True}, {"subsampling": 0}],
    "JPEG2000": [{}, {"irreversible": True}, {"no_jp2": True}],
    "WEBP": [{}, {"lossless": True}],
    "DDS": [{}, {"pixel_format": "DXT1"}, {"pixel_format": "DXT5"}],
    "TGA": [{}, {"compression": "tga_rle"}],
}  # fmt: skip
_FRAMES = ("GIF", "PNG", "TIFF", "WEBP", "MPO", "AVIF")
# First bytes of formats that are only read; what follows is random.
_MAGICS = (
    b"\xaf\x11", b"\x0e\x00\x00\x00\x12\xaf", b"8BPS\x00\x01", b"Yj\xa6\x95", b"SIMPLE  =  ", b"P7 332\n",
    b"\x80\xe8\x00\x00", b"\x00\x00\x00\x00\x00\x00\x00\x04", b"\x00\x00\x02\x00\x01\x00", b"\xb1\x68\xde\x3a", b"FTEX",
    b"BLP1", b"BLP2", b"GRIB", b"BUFR", b"\x89HDF\r\n\x1a\n", b"\xd7\xcd\xc6\x9a\x00\x00", b"\x01\x00\x00\x00",
    b"\x00\x00\x01\xb3",     b"/* XPM */\n", b"\x1c\x02", b"DanM", b"LinS", b"qoif", b"\x00\x00\x00\x14GIMP",
)  # fmt: skip

# Sizes, orientation, resolution, sub-directories, maker notes, multi-picture, XMP.
_TAGS = (256, 257, 274, 282, 283, 296, 306, 33432, 34665, 34853, 37510, 40965, 45056, 45057, 45058, 700)


def make(rng: random.Random) -> Case:
    """One file: damaged somewhere, or whole with broken metadata, or of a format that is only read."""
    way = rng.random()
    if way < 0.25:
        return _with_broken_metadata(rng)
    if way < 0.35:
        return _with_a_broken_chunk(rng)
    if way < 0.42:
        magic = rng.choice(_MAGICS)
        return Case(f"magic {magic!r}", magic + rng.randbytes(rng.randint(0, 600)))
    name = rng.choice(tuple(seeds()))
    return Case(name, damaged(seeds()[name], rng))


def read(path: Path) -> None:
    """As a run does before its first step, and at the step."""
    image_size(path)
    picture = to_rgb(open_image(path))
    assert picture.mode == "RGB" and np.asarray(picture).shape == (picture.height, picture.width, 3)


KIND = Kind("images", "image.bin", make, read)


@functools.cache
def seeds() -> dict[str, bytes]:
    """Whole small files by format, mode and options."""
    found: dict[str, bytes] = {}
    Image.init()
    for name in sorted(set(Image.SAVE) - _NOT_WRITTEN):
        for mode in _MODES:
            for options in _OPTIONS.get(name, [{}]):
                data = _saved(picture(mode), name, **options)
                if data is not None:
                    found[f"{name} {mode} {' '.join(map(str, options.values()))}"] = data
    for name in _FRAMES:
        more = [picture("RGB", shift) for shift in (3, 9)]
        data = _saved(picture("RGB"), name, save_all=True, append_images=more)
        if data is not None:
            found[f"{name} frames"] = data
    return {**found, **_by_hand()}


def picture(mode: str, shift: int = 0) -> Image.Image:
    """A ramp with a pattern, in any mode."""
    width, height = SIZE
    ramp = (np.arange(width * height).reshape(height, width) * 255 // (width * height) + 7 * shift) % 256
    if mode == "I;16":
        return Image.fromarray((ramp * 257).astype(np.uint16))
    if mode == "I":
        return Image.fromarray((ramp * 257).astype(np.int32))
    if mode == "F":
        return Image.fromarray((ramp / 255).astype(np.float32))
    colour = np.stack([ramp, 255 - ramp, (ramp * 5) % 256], axis=2).astype(np.uint8)
    image = Image.fromarray(colour)
    return (
        image
        if mode == "RGB"
        else image.convert("L" if mode == "LAB" else mode).convert(mode)
        if mode != "LAB"
        else _lab()
    )


def _lab() -> Image.Image:
    return Image.merge("LAB", [picture("L"), picture("L", 2), picture("L", 4)])


def _saved(image: Image.Image, name: str, **options: Any) -> bytes | None:
    """None where the format, or the library behind it, does not take this mode or option."""
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings(action="ignore"):
            image.save(buffer, format=name, **options)
    except Exception:  # noqa: BLE001  # encoders' errors are an open set, and no matter of the product
        return None
    return buffer.getvalue()


def _with_broken_metadata(rng: random.Random) -> Case:
    """A whole picture whose EXIF, colour profile or XMP is not: it must be read."""
    name = rng.choice(("JPEG", "JPEG", "PNG", "PNG", "WEBP", "TIFF", "MPO", "AVIF", "JPEG2000"))
    kind = rng.choice(("exif", "icc_profile", "xmp"))
    payload = {"exif": _exif, "icc_profile": _profile, "xmp": _xmp}[kind](rng)
    options: dict[str, Any] = {kind: payload}
    if name == "TIFF":
        options = {"tiffinfo": None, "icc_profile": _profile(rng)} if kind != "xmp" else {"tiffinfo": {700: payload}}
    if name == "MPO":
        options |= {"save_all": True, "append_images": [picture("RGB", 3)]}
    data = _saved(picture("RGB"), name, **options)
    if data is None:  # the writer itself refuses such metadata
        return Case(f"{name} plain", seeds()["PNG RGB "], must_be_read=True)
    return Case(f"{name} with broken {kind}", data, must_be_read=True)


def _exif(rng: random.Random) -> bytes:
    """Tags of wrong types and counts, and offsets to nowhere, with or without an orientation, then damaged."""
    order = rng.choice("<>")
    entries = []
    for _ in range(rng.randint(0, 8)):
        tag = rng.choice((*_TAGS, rng.randrange(65536)))
        count = rng.choice((0, 1, 2, 4, 999, 2**31, 2**32 - 1))
        entries.append(struct.pack(f"{order}HHI4s", tag, rng.randint(0, 14), count, rng.randbytes(4)))
    mark = b"II*\0" if order == "<" else b"MM\0*"
    block = mark + struct.pack(f"{order}IH", 8, len(entries)) + b"".join(entries) + struct.pack(f"{order}I", 0)
    if rng.random() < 0.5:
        block = damaged(block, rng)
    return b"Exif\0\0" + block


def _profile(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randint(0, 400))


def _xmp(rng: random.Random) -> bytes:
    text = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/><!ENTITY a "&a;"></x:xmpmeta>'
    return damaged(text, rng)


def _with_a_broken_chunk(rng: random.Random) -> Case:
    """A PNG of which one chunk's content is damaged and its checksum is right, so that the damage is looked at."""
    name = rng.choice([name for name in seeds() if name.startswith("PNG")])
    data = seeds()[name]
    chunks, position = [], 8
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        chunks.append((data[position + 4 : position + 8], data[position + 8 : end - 4]))
        position = end
    extra = rng.choice(
        (b"iCCP", b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"gAMA", b"pHYs", b"sRGB", b"acTL", b"fcTL", b"tRNS")
    )
    chunks.insert(1, (extra, rng.randbytes(rng.randint(0, 40))))
    chosen = rng.randrange(len(chunks))
    chunks[chosen] = chunks[chosen][0], damaged(chunks[chosen][1], rng)
    body = b"".join(
        len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
        for kind, content in chunks
    )
    return Case(f"{name} with a broken {chunks[chosen][0].decode()}", data[:8] + body)


def _by_hand() -> dict[str, bytes]:
    """Formats that Pillow reads and does not write, as small as they may be."""
    width, height = SIZE
    grey = picture("L").tobytes()
    cards = ("SIMPLE  =                    T", "BITPIX  =                    8", "NAXIS   =                    2",
             f"NAXIS1  = {width:20d}", f"NAXIS2  = {height:20d}", "END")  # fmt: skip
    icon = _saved(picture("RGB").resize((16, 16)), "ICO", bitmap_format="bmp")
    pcx = _saved(picture("RGB"), "PCX")
    assert icon is not None and pcx is not None
    rows = "".join(f'"{"ab" * (width // 2)}",\n' for _ in range(height))
    xpm = f'"{width} {height} 2 1",\n"a c #ff0000",\n"b c #00ff00",\n{rows}'
    fli = struct.pack("<IHHHHHHI", 128, 0xAF11, 1, width, height, 8, 3, 5) + bytes(108)
    pixar = b"\x80\xe8\x00\x00" + bytes(412) + struct.pack("<6H", height, width, 8, 8, 14, 2) + bytes(596)
    return {
        "FITS": "".join(card.ljust(80) for card in cards).ljust(2880).encode() + grey,
        "SUN": struct.pack(">8I", 0x59A66A95, width, height, 8, len(grey), 1, 0, 0) + grey,
        "PSD": b"8BPS" + struct.pack(">H6xHIIHH", 1, 1, height, width, 8, 1) + bytes(12) + bytes(2) + grey,
        "CUR": icon[:2] + b"\x02" + icon[3:],
        "DCX": struct.pack("<3I", 0x3ADE68B1, 12, 0) + pcx,
        "XPM": f"/* XPM */\nstatic char *x[] = {{\n{xpm}}};".encode(),
        "GBR": struct.pack(">5I", 28, 2, width, height, 1) + b"GIMP" + struct.pack(">I", 10) + grey,
        "XVTHUMB": f"P7 332\n#END_OF_COMMENTS\n{width} {height} 255\n".encode() + grey,
        "FLI": fli + struct.pack("<IHH8xIH", 42, 0xF1FA, 1, 6, 13) + bytes(20),
        "PIXAR": pixar + picture("RGB").tobytes(),
    }
