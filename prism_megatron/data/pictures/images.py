"""From an image file to the patches that the vision tower reads, by transformers' own PIL processor.

The processor is loaded by itself: AutoProcessor would also load the video processor, which needs torchvision. Its
settings are those of the folder, in whichever form they are saved (``data/reading/model_files.py``).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from prism_megatron.data.pictures.colours import to_rgb
from prism_megatron.data.reading.intake import ImageError
from prism_megatron.data.reading.model_files import image_settings
from prism_megatron.errors import DataError
from prism_megatron.types import ImageInput

LEVEL_TOLERANCE = 0.01  # of 255 colour levels; float32 normalisation moves one by 8e-6


def blanked(image: ImageInput) -> ImageInput:
    """An image of the same size and of one colour, the middle one (pixels of 0 after normalisation)."""
    return replace(image, pixel_values_P_D=np.zeros_like(image.pixel_values_P_D))


class ImagePreprocessor:
    """Turns pictures into patches, and sizes into token counts."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    @classmethod
    def from_folder(cls, folder: Path) -> ImagePreprocessor:
        """Raises DataError as ``image_settings``."""
        return cls(Qwen2VLImageProcessorPil.from_dict(image_settings(folder)))

    def __call__(self, image: Image.Image) -> ImageInput:
        """``pixel_values_P_D`` float32, P = t·h·w patches of D = 3 · temporal_patch · patch · patch values.

        Raises ImageError for a shape the model cannot take (sides differing by more than a factor of 200).
        """
        try:
            features = self._processor(images=[to_rgb(image)], return_tensors="np")
        except ValueError as error:
            raise ImageError(f"an image of {image.width}x{image.height} pixels cannot be processed: {error}") from error
        t, h, w = (int(n) for n in features["image_grid_thw"][0])
        return ImageInput(np.ascontiguousarray(features["pixel_values"], dtype=np.float32), (t, h, w))

    @property
    def area_limits(self) -> tuple[int, int]:
        """The least and the largest area that an image is given, in pixels."""
        size = self._processor.size
        return int(size["shortest_edge"]), int(size["longest_edge"])

    def with_area_limits(self, least: int, largest: int) -> ImagePreprocessor:
        """The same but for these limits."""
        processor = copy.copy(self._processor)
        processor.size = type(processor.size)(shortest_edge=least, longest_edge=largest)
        return ImagePreprocessor(processor)

    @property
    def pixels_of_a_token(self) -> int:
        """The area that one image pad stands for."""
        return (int(self._processor.patch_size) * int(self._processor.merge_size)) ** 2

    def picture(self, image: ImageInput) -> Image.Image:
        """The resized RGB picture that ``image`` was cut from, bit for bit: the inverse of a call, but for the resize.

        Raises DataError for patches that no 8-bit picture has under this folder's settings.
        """
        processor = self._processor
        _, h, w = image.grid_thw
        merge, patch, frames = int(processor.merge_size), int(processor.patch_size), int(processor.temporal_patch_size)
        patches = image.pixel_values_P_D.reshape(h // merge, w // merge, merge, merge, 3, frames, patch, patch)
        # Rows: block, row of patches in it, row of pixels in that; columns alike. Frames of a still image are equal.
        normalised = patches[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4).reshape(h * patch, w * patch, 3)
        levels = (normalised * processor.image_std + processor.image_mean) / processor.rescale_factor
        whole = np.rint(levels)
        if not (np.abs(levels - whole).max() <= LEVEL_TOLERANCE and whole.min() >= 0.0 and whole.max() <= 255.0):
            raise DataError(
                "an image's patches are not those of a picture of 8-bit colours, so it cannot be sent as one"
            )
        return Image.fromarray(whole.astype(np.uint8))

    def num_tokens(self, grid_thw: tuple[int, int, int]) -> int:
        """Image pads of one image: its patches, merged."""
        t, h, w = grid_thw
        return t * h * w // int(self._processor.merge_size) ** 2

    def num_tokens_of_size(self, size: tuple[int, int]) -> int:
        """Image pads of a picture of this (width, height), without reading its pixels. Raises ImageError as above."""
        width, height = size
        try:
            patches = int(self._processor.get_number_of_image_patches(height, width))
        except ValueError as error:
            raise ImageError(f"an image of {width}x{height} pixels cannot be processed: {error}") from error
        return patches // int(self._processor.merge_size) ** 2
