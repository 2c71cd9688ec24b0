"""When two pictures look alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from prism_megatron.curation.duplicates.look import LOOK_BYTES, Looks, differences, sketch_picture

WHITE, BLACK, RED, BLUE = (255, 255, 255), (0, 0, 0), (220, 30, 30), (30, 30, 220)


def drawn(
    digit: str = "7", colour: tuple[int, int, int] = RED, size: tuple[int, int] = (400, 300)
) -> Image.Image:  # fmt: skip
    """A coloured disc and a digit on white."""
    image = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(image)
    draw.ellipse((60, 60, 200, 200), fill=colour)
    draw.text((260, 120), digit, fill=BLACK, font_size=40)
    return image


def looks(folder: Path, *images: Image.Image) -> Looks:
    rows = []
    for number, image in enumerate(images):
        path = folder / f"{number}.png"
        image.save(path)
        sketch = sketch_picture(path)
        assert not isinstance(sketch, str) and len(sketch.look) == LOOK_BYTES
        rows.append(np.frombuffer(sketch.look, dtype=np.uint8))
    return np.stack(rows)


@pytest.mark.parametrize(
    ("changed", "least", "most"),
    [
        (drawn(), 0, 0),
        (drawn().resize((160, 120)), 0, 20),
        (drawn().resize((100, 75)), 0, 20),
        (drawn().resize((700, 525)), 0, 20),
        (ImageEnhance.Brightness(drawn()).enhance(0.7), 0, 20),
        (ImageEnhance.Contrast(drawn()).enhance(0.7), 0, 20),
        (drawn("1"), 40, 255),
        (drawn(colour=BLUE), 100, 255),
        (Image.new("RGB", (400, 300), WHITE), 40, 255),
        (drawn().crop((40, 0, 400, 300)), 40, 255),
    ],
)  # fmt: skip
def test_a_changed_picture_looks_alike_and_another_does_not(
    changed: Image.Image, least: float, most: float, tmp_path: Path
) -> None:
    """Claim: size, brightness and contrast leave the difference under the bound of 32, one digit or colour does not,
    whichever of both comes first; neither does what else is compared beside it."""
    original, other, blank = looks(tmp_path, drawn(), changed, Image.new("RGB", (20, 20)))[:, None]
    (found,) = differences(original, other)
    assert least <= found <= most
    together = differences(np.concatenate([other, blank, original]), np.concatenate([original, original, original]))
    assert together[0] == found and together[2] == 0


def test_a_page_of_small_print_looks_alike_when_it_is_small(tmp_path: Path) -> None:
    """Claim: where places would have few pixels, fewer places are compared, and thin strokes stay where they are."""
    page = Image.new("RGB", (240, 150), WHITE)
    draw = ImageDraw.Draw(page)
    for line in range(10):
        draw.text((5, 5 + 14 * line), "thin strokes side by side, a few at a time", fill=BLACK, font_size=11)
    small = [page.resize((72, 45), how) for how in (Image.Resampling.LANCZOS, Image.Resampling.BOX)]
    original, *others = looks(tmp_path, page, *small)
    found = differences(np.stack([original, original]), np.stack(others))
    assert found.max() < 20


def test_blank_pictures_of_other_colours_look_different(tmp_path: Path) -> None:
    """Claim: a picture without anything in it is not fitted to just any other."""
    black, white, blue = looks(tmp_path, *(Image.new("RGB", (50, 50), colour) for colour in (BLACK, WHITE, BLUE)))
    assert differences(black[None], white[None])[0] > 100
    assert differences(white[None], blue[None])[0] > 100


def test_pixels_are_hashed_and_not_files(tmp_path: Path) -> None:
    """Claim: another compression, and full opacity, leave the hash of the pixels; another size does not."""
    image = drawn()
    for name, one in (("a", image), ("b", image.convert("RGBA")), ("c", image.resize((300, 400)))):
        one.save(tmp_path / f"{name}.png", compress_level=1 if name == "a" else 9)
    a, b, c = (sketch_picture(tmp_path / f"{name}.png") for name in "abc")
    assert not isinstance(a, str) and not isinstance(b, str) and not isinstance(c, str)
    assert a == b
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    flat = [Image.frombytes("L", size, bytes(12)) for size in ((3, 4), (4, 3))]
    for number, one in enumerate(flat):
        one.save(tmp_path / f"flat{number}.png")
    first, second = (sketch_picture(tmp_path / f"flat{number}.png") for number in range(2))
    assert not isinstance(first, str) and not isinstance(second, str) and first.pixels != second.pixels


def test_what_is_no_picture_is_a_reason_and_no_error(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    assert "cannot be read" in str(sketch_picture(path))
    assert str(path) in str(sketch_picture(path))
