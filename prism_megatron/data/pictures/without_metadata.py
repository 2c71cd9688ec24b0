"""An image file without what only describes the picture, for decoders that refuse the whole for that part."""

from __future__ import annotations

import io
from pathlib import Path

_PNG, _PNG_NEEDED = b"\x89PNG\r\n\x1a\n", (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_JPEG, _START_OF_SCAN = b"\xff\xd8", 0xDA
# JFIF says the density and Adobe how colours are stored; all other application segments and comments describe.
_APPLICATION, _COMMENT, _JPEG_NEEDED = range(0xE0, 0xF0), 0xFE, (0xE0, 0xEE)


def without_metadata(stored: Path | bytes) -> bytes | None:
    """A PNG or JPEG file, which may be damaged, with its pixels' parts alone; None for any other, which is not read.

    Each part is copied bit for bit, so damaged pixels stay damaged. Raises OSError.
    """
    with io.BytesIO(stored) if isinstance(stored, bytes) else stored.open("rb") as file:
        first = file.read(len(_PNG))
        if first == _PNG:
            return _png(first + file.read())
        return _jpeg(first + file.read()) if first.startswith(_JPEG) else None


def _png(data: bytes) -> bytes:
    """Chunks: length of 4 bytes, name of 4, content, checksum of 4."""
    kept, position = [_PNG], len(_PNG)
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] in _PNG_NEEDED:
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def _jpeg(data: bytes) -> bytes:
    """Segments up to the first scan: 0xff, marker, length of 2 bytes that counts itself, content."""
    kept, position = [_JPEG], len(_JPEG)
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != _START_OF_SCAN:
        marker = data[position + 1]
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in _JPEG_NEEDED or (marker not in _APPLICATION and marker != _COMMENT):
            kept.append(data[position:end])
        position = end
    return b"".join([*kept, data[position:]])
