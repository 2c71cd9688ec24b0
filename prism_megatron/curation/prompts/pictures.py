"""How an image is sent: its own file where every reader sees the same in it, else a PNG of what training sees."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from prism_megatron.data.pictures.colours import to_rgb
from prism_megatron.data.pictures.files import open_image, plain_format
from prism_megatron.data.reading.intake import ImageError

MEDIA = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
"""What endpoints read, by Pillow's names."""
MAX_BYTES = 2**23
"""Of a file that is sent as it is."""
MAX_AREA = 4_000_000
"""In pixels, of a picture that is sent as a PNG; a larger one is shrunk."""


def data_url(path: Path) -> str:
    """The image as a data URL. Raises ImageError for one that cannot be read.

    A PNG, JPEG or WebP file of up to 8 MiB is sent byte for byte where it holds one opaque, upright picture of 8 bits a
    colour. Of any other the picture that training sees (upright, over white) is sent as a PNG.
    """
    try:
        small = path.stat().st_size <= MAX_BYTES
        kind = plain_format(path) if small else None
        stored = path.read_bytes() if kind in MEDIA else b""
    except OSError as error:
        raise ImageError(f"{path}: the image cannot be read: {error.strerror or error}") from error
    if kind is None or kind not in MEDIA:
        kind, stored = "PNG", _png(to_rgb(open_image(path)))
    return f"data:{MEDIA[kind]};base64,{base64.b64encode(stored).decode('ascii')}"


def _png(image: Image.Image) -> bytes:
    area = image.width * image.height
    if area > MAX_AREA:
        share = (MAX_AREA / area) ** 0.5
        image = image.resize((max(1, int(image.width * share)), max(1, int(image.height * share))))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
