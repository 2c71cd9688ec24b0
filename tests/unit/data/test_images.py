"""Images of every mode arrive as RGB, and bad files are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prism_megatron.data.pictures import files as image_files
from prism_megatron.data.pictures.colours import to_rgb
from prism_megatron.data.pictures.files import image_size, open_image
from prism_megatron.data.pictures.images import ImagePreprocessor
from prism_megatron.errors import DataError
from prism_megatron.types import ImageInput


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"]
)
def test_any_mode_becomes_rgb(mode: str, mini_folder: Path) -> None:
    picture = to_rgb(Image.new(mode, (64, 32)))
    assert picture.mode == "RGB" and picture.size == (64, 32)
    features = ImagePreprocessor.from_folder(mini_folder)(picture)
    assert features.grid_thw == (1, 2, 4)
    assert features.pixel_values_P_D.shape == (8, 1536) and features.pixel_values_P_D.dtype == np.float32


def test_transparency_lies_over_white_and_16_bit_grey_is_scaled() -> None:
    assert to_rgb(Image.new("RGBA", (1, 1), (10, 20, 30, 0))).getpixel((0, 0)) == (255, 255, 255)
    half = Image.fromarray(np.full((1, 1), 0x8000, dtype=np.uint16))
    assert to_rgb(half).getpixel((0, 0)) == (128, 128, 128)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "photo.jpg", exif=exif)
    assert open_image(tmp_path / "photo.jpg").size == (20, 40)


@pytest.mark.parametrize("size", [(96, 96), (20, 300), (700, 31), (33, 33), (4000, 3000)])
def test_tokens_of_a_size_are_those_of_the_image(size: tuple[int, int], mini_folder: Path) -> None:
    preprocessor = ImagePreprocessor.from_folder(mini_folder)
    features = preprocessor(Image.new("RGB", size))
    assert preprocessor.num_tokens(features.grid_thw) == preprocessor.num_tokens_of_size(size)


@pytest.mark.parametrize("size", [(96, 96), (20, 30), (333, 100), (4000, 3000)])
def test_a_picture_comes_back_from_its_patches(size: tuple[int, int], mini_folder: Path) -> None:
    """What a server is sent: it gives the same patches again, bit for bit, and its own size is left alone."""
    preprocessor = ImagePreprocessor.from_folder(mini_folder)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    features = preprocessor(Image.fromarray(noise))
    picture = preprocessor.picture(features)
    again = preprocessor(picture)
    assert again.grid_thw == features.grid_thw
    assert np.array_equal(again.pixel_values_P_D, features.pixel_values_P_D)
    if size == (96, 96):
        assert np.array_equal(np.asarray(picture), noise), "a picture of a size the model takes comes back itself"


def test_patches_of_no_picture_are_refused(mini_folder: Path) -> None:
    preprocessor = ImagePreprocessor.from_folder(mini_folder)
    features = preprocessor(Image.new("RGB", (64, 64), (9, 99, 199)))
    level = np.float32(2 / 255)  # of one colour, normalised
    values = features.pixel_values_P_D
    for wrong in (values + 0.003, values * np.nan, values * 9, values + 100 * level, values - 20 * level):
        with pytest.raises(DataError, match="8-bit colours"):
            preprocessor.picture(ImageInput(wrong, features.grid_thw))


def test_broken_and_huge_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (64, 64), (1, 2, 3)).save(path)
    for content in (b"", b"not an image", path.read_bytes()[:60]):
        (tmp_path / "broken.png").write_bytes(content)
        with pytest.raises(DataError, match=r"broken\.png: the image cannot be read"):
            open_image(tmp_path / "broken.png")
    monkeypatch.setattr(image_files, "MAX_PIXELS", 1000)
    for read in (open_image, image_size):
        with pytest.raises(DataError, match="64x64"):
            read(path)


def test_extreme_shapes_and_default_settings_are_refused(mini_folder: Path, tmp_path: Path) -> None:
    preprocessor = ImagePreprocessor.from_folder(mini_folder)
    with pytest.raises(DataError, match="aspect ratio"):
        preprocessor(Image.new("RGB", (500, 1)))
    with pytest.raises(DataError, match="aspect ratio"):
        preprocessor.num_tokens_of_size((500, 1))
    with pytest.raises(DataError, match="does not exist"):
        ImagePreprocessor.from_folder(tmp_path)
    settings = json.loads((mini_folder / "preprocessor_config.json").read_text())
    del settings["patch_size"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="patch_size missing"):
        ImagePreprocessor.from_folder(tmp_path)
