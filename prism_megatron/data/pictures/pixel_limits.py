"""How large images are before they become tokens, where a run wants that otherwise than the model's folder says.

transformers' processor shrinks images of a larger area to ``longest_edge`` and enlarges those of a smaller one to
``shortest_edge``; both are areas in pixels, whatever their names say.

A run has one preprocessor, that of its ``Renderer``: what it learns from, judges and samples from is cut by it. SGLang
servers are sent pictures that it has resized, and have limits of their own, those of the model's folder.
"""

from __future__ import annotations

from prism_megatron.data.pictures.images import ImagePreprocessor
from prism_megatron.errors import ConfigError


def with_pixel_limits(
    preprocessor: ImagePreprocessor, *, min_pixels: int | None, max_pixels: int | None
) -> ImagePreprocessor:
    """The same preprocessor with other limits; None leaves one as the folder has it.

    Raises ConfigError for limits that no image meets: one patch after merging is the least that an image has.
    """
    if min_pixels is None and max_pixels is None:
        return preprocessor
    least, largest = preprocessor.area_limits
    least, largest = least if min_pixels is None else min_pixels, largest if max_pixels is None else max_pixels
    if largest < (token := preprocessor.pixels_of_a_token):
        raise ConfigError(f"--max-pixels {largest} must be at least {token}: one token of this model shows as many")
    if least > largest:
        raise ConfigError(
            f"--min-pixels {least} must be at most --max-pixels {largest}; one that is not given is the model's"
        )
    return preprocessor.with_area_limits(least, largest)


def check_served_limits(preprocessor: ImagePreprocessor, served: ImagePreprocessor) -> None:
    """Raise ConfigError for a run's limits beyond those of the servers, which would resize its pictures once more."""
    least, largest = preprocessor.area_limits
    served_least, served_largest = served.area_limits
    remedy = "servers resize by the model's folder; write the limit into its preprocessor_config.json"
    if largest > served_largest:
        raise ConfigError(f"--max-pixels {largest} must be at most {served_largest} with --rollout sglang: {remedy}")
    if least < served_least:
        raise ConfigError(f"--min-pixels {least} must be at least {served_least} with --rollout sglang: {remedy}")
