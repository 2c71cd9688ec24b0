"""Image files: whatever a decoder raises is one error that names the file; what only describes a picture breaks none.

Blind spot: decoders that do not come back, or that take all memory; ``python -m tests.fuzz`` looks for those.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import BmpImagePlugin, Image, ImageOps

from prism_megatron.data.pictures import files as image_files
from prism_megatron.data.pictures.files import image_size, look_at, open_image
from prism_megatron.data.reading.intake import ImageError

SIZE = (40, 20)


def photo(folder: Path, name: str = "photo.jpg", **options: Any) -> Path:
    """A ramp whose corners differ."""
    across, down = np.meshgrid(np.linspace(0, 255, SIZE[0]), np.linspace(0, 255, SIZE[1]))
    Image.fromarray(np.stack([across, down, across * 0], axis=2).astype(np.uint8)).save(folder / name, **options)
    return folder / name


def exif_with(*entries: tuple[int, int, int, bytes]) -> bytes:
    """(tag, type, count, four bytes) of the first directory."""
    packed = b"".join(struct.pack("<HHI4s", *entry) for entry in sorted(entries))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)


ORIENTATION_6 = (274, 3, 1, b"\x06\0\0\0")
WIDTH_AS_TEXT = (256, 2, 4, b"big\0")
BROKEN = {
    "a width that is text": exif_with(WIDTH_AS_TEXT, ORIENTATION_6),
    "a directory at nowhere": exif_with((34665, 4, 1, b"\xff\xff\xff\x7f"), ORIENTATION_6),
    "a rational over zero": exif_with((282, 5, 1, b"\x1a\0\0\0"), ORIENTATION_6),
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_pillow_turns_them(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    for name in ("photo.png", "photo.tif"):
        path = photo(tmp_path, name, exif=exif)
        with Image.open(path) as image:
            wanted = ImageOps.exif_transpose(image)
            assert np.array_equal(np.asarray(open_image(path)), np.asarray(wanted)), name


@pytest.mark.parametrize("exif", BROKEN.values(), ids=BROKEN)
def test_broken_exif_keeps_no_picture_from_being_read(exif: bytes, tmp_path: Path) -> None:
    """Claim: its pixels are used, turned by its orientation, which is valid."""
    for name in ("photo.jpg", "photo.webp", "photo.png"):
        path = photo(tmp_path, name, exif=exif)
        assert image_size(path) == SIZE
        assert open_image(path).size == (SIZE[1], SIZE[0]), name


@pytest.mark.parametrize("orientation", [(274, 2, 4, b"six\0"), (274, 3, 1, b"\x09\0\0\0")])
def test_an_orientation_that_is_none_turns_nothing(orientation: tuple[int, int, int, bytes], tmp_path: Path) -> None:
    assert open_image(photo(tmp_path, exif=exif_with(orientation))).size == SIZE


def test_parts_that_only_describe_are_left_out_where_the_decoder_stumbles_over_them(tmp_path: Path) -> None:
    """A PNG's text chunk with a wrong checksum, and a JPEG's segment of pictures that is cut short."""
    path = photo(tmp_path, "photo.png")
    data = path.read_bytes()
    chunk = b"tEXt" + b"Comment\0hello"
    wrong = (len(chunk) - 4).to_bytes(4, "big") + chunk + (zlib.crc32(chunk) ^ 1).to_bytes(4, "big")
    path.write_bytes(data[:33] + wrong + data[33:])
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(path)
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(Image.open(io.BytesIO(data))))
    assert image_size(path) == SIZE

    path.write_bytes(data[:33] + wrong + data[33:-60])
    with pytest.raises(ImageError, match="cannot be read"):
        open_image(path)


@pytest.mark.parametrize(
    "error",
    [struct.error, RuntimeError, SyntaxError, OverflowError, MemoryError, zlib.error, KeyError, ZeroDivisionError,
     TypeError, IndexError, AttributeError, EOFError, RecursionError],
)  # fmt: skip
def test_whatever_a_decoder_raises_is_one_error_that_names_the_file(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = photo(tmp_path, "photo.bmp")

    def broken(*_arguments: object, **_options: object) -> Image.Image:
        raise error("deep\ndown")

    monkeypatch.setattr(Image, "open", broken)
    for read in (open_image, image_size):
        with pytest.raises(ImageError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: the image cannot be read: ")
        assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


def test_an_interrupt_is_no_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: object) -> Image.Image:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_image(photo(tmp_path, "photo.bmp"))


def test_pages_that_another_program_draws_are_refused(tmp_path: Path) -> None:
    photo(tmp_path, "page.eps")
    for read in (open_image, image_size):
        with pytest.raises(ImageError, match=r"page\.eps: EPS is drawn by a program of its own, which is not run"):
            read(tmp_path / "page.eps")


def test_sizes_are_checked_before_pixels_inside_other_files_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An icon says 16x16 and holds a PNG of 200x200: known only once that is opened."""
    inner = io.BytesIO()
    Image.new("RGB", (200, 200)).save(inner, format="PNG")
    data = inner.getvalue()
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(data), 22) + data
    (tmp_path / "x.ico").write_bytes(icon)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 10_000)
    for bound in (5_000, None):  # Pillow's own, and ours where it has none
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", bound)
        with pytest.raises(ImageError, match=r"x\.ico: .*(200x200|40000 pixels)"):
            open_image(tmp_path / "x.ico")


def test_a_tiny_file_of_a_huge_picture_is_refused_from_its_header(tmp_path: Path) -> None:
    """60000 x 60000 pixels in 70 bytes: neither warned about nor decoded."""
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")
        for name, content in chunks
    )
    (tmp_path / "bomb.png").write_bytes(data)
    for read in (open_image, image_size):
        with pytest.raises(ImageError, match=r"bomb\.png: "):
            read(tmp_path / "bomb.png")


def test_pillows_remarks_are_kept_from_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large pictures, and damaged EXIF; in threads too, after which the filters are as they were."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    paths = [photo(tmp_path, f"{i}.jpg", exif=exif_with((282, 5, 1, b"\xff\xff\0\0"), WIDTH_AS_TEXT)) for i in range(8)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        open_image(paths[0])
        assert look_at(paths, pixels=True) == [SIZE] * 8
        assert warnings.filters == before
    assert [str(one.message) for one in told] == []


def test_a_look_sees_sizes_or_what_is_wrong_in_order_and_counts(tmp_path: Path) -> None:
    whole, cut = photo(tmp_path, "whole.jpg"), photo(tmp_path, "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:-80])
    paths = [whole, tmp_path / "none.jpg", cut] * 3
    done: list[int] = []
    seen = look_at(paths, pixels=False, advance=done.append)
    assert sum(done) == len(paths)
    assert seen[::3] == [SIZE] * 3 and seen[2::3] == [SIZE] * 3, "a header is whole where the pixels are not"
    assert all(f"{tmp_path / 'none.jpg'}: the image cannot be read" in str(fault) for fault in seen[1::3])
    seen = look_at(paths, pixels=True)
    assert seen[::3] == [SIZE] * 3
    assert all(f"{cut}: the image cannot be read" in str(fault) and "truncated" in str(fault) for fault in seen[2::3])


@pytest.mark.parametrize("name", ["damaged_header.avif", "damaged_colours.avif", "truncated.jpg", "mistyped_exif.jpg"])
def test_files_from_reports(name: str, shared_dir: Path) -> None:
    path = shared_dir / "cases" / name
    if not path.is_file():
        pytest.skip("the shared data have no cases")
    if name == "mistyped_exif.jpg":
        assert open_image(path).size == (48, 64), "64x48, turned as its orientation says"
        return
    with pytest.raises(ImageError, match=rf"{name}: the image cannot be read: "):
        open_image(path)


def test_a_picture_whose_metadata_cannot_be_read_is_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_image: Image.Image) -> Image.Exif:
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(Image.Image, "getexif", broken)
    assert open_image(photo(tmp_path, "photo.bmp")).size == SIZE


def test_a_size_that_grows_while_it_is_decoded_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an icon, which decides on one of several pictures only then."""
    path, load = photo(tmp_path, "photo.bmp"), BmpImagePlugin.BmpImageFile.load

    def grown(image: Any) -> Any:
        result = load(image)
        image._size = (1000, 1000)
        return result

    monkeypatch.setattr(BmpImagePlugin.BmpImageFile, "load", grown)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 10_000)
    with pytest.raises(ImageError, match=r"photo\.bmp: an image of 1000x1000 pixels; at most 10000"):
        open_image(path)
