"""Other limits of images' areas give what transformers' processor gives with them, pixel for pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from prism_megatron.data.images import ImagePreprocessor
from prism_megatron.data.pixel_limits import with_pixel_limits
from prism_megatron.errors import ConfigError

SIZES = [(96, 96), (20, 30), (333, 100), (700, 31), (1200, 900)]


@pytest.mark.parametrize(("least", "most"), [(None, 64 * 64), (96 * 96, None), (40_000, 50_000), (1024, 1024)])
@pytest.mark.parametrize("size", SIZES)
def test_limits_are_those_of_transformers(
    least: int | None, most: int | None, size: tuple[int, int], mini_folder: Path
) -> None:
    plain = ImagePreprocessor.from_folder(mini_folder)
    limited = with_pixel_limits(plain, min_pixels=least, max_pixels=most)
    of_folder = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    wanted = {name: value or of_folder[name] for name, value in (("shortest_edge", least), ("longest_edge", most))}
    oracle = Qwen2VLImageProcessorPil.from_pretrained(mini_folder, local_files_only=True, size=wanted)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    expected = oracle(images=[picture], return_tensors="np")
    found = limited(picture)
    assert np.array_equal(found.pixel_values_P_D, expected["pixel_values"])
    assert found.grid_thw == tuple(expected["image_grid_thw"][0])
    assert limited.num_tokens_of_size(size) == limited.num_tokens(found.grid_thw)
    assert limited.picture(found).size == (found.grid_thw[2] * 16, found.grid_thw[1] * 16)


def test_the_folders_own_limits_stay_as_they_are(mini_folder: Path) -> None:
    """Claim: the preprocessor that was given does not change, and none given changes nothing."""
    plain = ImagePreprocessor.from_folder(mini_folder)
    before = plain.num_tokens_of_size((500, 500))
    assert with_pixel_limits(plain, min_pixels=None, max_pixels=64 * 64).num_tokens_of_size((500, 500)) == 4 != before
    assert plain.num_tokens_of_size((500, 500)) == before
    assert with_pixel_limits(plain, min_pixels=None, max_pixels=None) is plain


def test_limits_that_no_image_meets_are_refused(mini_folder: Path) -> None:
    plain = ImagePreprocessor.from_folder(mini_folder)
    with pytest.raises(ConfigError, match="--max-pixels 1000 must be at least 1024"):
        with_pixel_limits(plain, min_pixels=None, max_pixels=1000)
    with pytest.raises(ConfigError, match="--min-pixels 20000 must be at most --max-pixels 16384"):
        with_pixel_limits(plain, min_pixels=20_000, max_pixels=None)
