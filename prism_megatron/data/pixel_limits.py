"""How large images are before they become tokens, where a run wants that otherwise than the model's folder says.

transformers' processor shrinks images of a larger area to ``longest_edge`` and enlarges those of a smaller one to
``shortest_edge``; both are areas in pixels, whatever their names say.
"""

from __future__ import annotations

import copy

from prism_megatron.data.images import ImagePreprocessor
from prism_megatron.errors import ConfigError


def with_pixel_limits(
    preprocessor: ImagePreprocessor, *, min_pixels: int | None, max_pixels: int | None
) -> ImagePreprocessor:
    """The same preprocessor with other limits; None leaves one as the folder has it.

    Training, rollout and evaluation must be given one and the same. Raises ConfigError for limits that no image meets:
    one patch after merging is the least that an image has.
    """
    if min_pixels is None and max_pixels is None:
        return preprocessor
    processor = copy.copy(preprocessor._processor)
    size = processor.size
    smallest = size["shortest_edge"] if min_pixels is None else min_pixels
    largest = size["longest_edge"] if max_pixels is None else max_pixels
    patch = (int(processor.patch_size) * int(processor.merge_size)) ** 2
    if largest < patch:
        raise ConfigError(f"--max-pixels {largest} must be at least {patch}: one token of this model shows as many")
    if smallest > largest:
        raise ConfigError(
            f"--min-pixels {smallest} must be at most --max-pixels {largest}; one that is not given is the model's"
        )
    processor.size = type(size)(shortest_edge=smallest, longest_edge=largest)
    return ImagePreprocessor(processor)
