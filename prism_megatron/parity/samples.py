"""Rows of random text, images and video frames for tiny models, in sets that each try one thing."""

from __future__ import annotations

import numpy as np

from prism_megatron.parity.probe import Sample
from prism_megatron.types import ImageInput, TokenSequence

IMAGE, VIDEO, START, END, PAD = 290, 291, 292, 293, 0
PATCH = 4
PATCH_DIM = 3 * 2 * PATCH * PATCH


def image(rng: np.random.Generator, grid: tuple[int, int, int]) -> ImageInput:
    """Random pixels; ``grid`` counts frames, rows and columns of patches."""
    pixels = rng.normal(size=(grid[0] * grid[1] * grid[2], PATCH_DIM)).astype(np.float32)
    return ImageInput(pixels, grid)


def row(rng: np.random.Generator, *parts: int | ImageInput) -> TokenSequence:
    """A row of random text (an int counts tokens) and images (each video frame between its own markers)."""
    ids: list[int] = []
    images = []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(2, 280, size=part).tolist()
            continue
        images.append(part)
        frames, height, width = part.grid_thw
        pad = IMAGE if frames == 1 else VIDEO
        for _ in range(frames):
            ids += [START, *[pad] * (height * width // 4), END]
    return TokenSequence(tuple(ids), tuple(images))


def sample_sets() -> dict[str, tuple[Sample, ...]]:
    """Four samples a set, of unequal lengths, so that two data-parallel ranks or two micro-batches get two each.

    ``no image on one rank``: the second half is text, and the first shows one image, fewer than context-parallel ranks.
    """
    rng = np.random.default_rng(7)
    small, wide, tall = (image(rng, grid) for grid in ((1, 4, 4), (1, 4, 8), (1, 6, 2)))
    video, long_video = image(rng, (3, 4, 6)), image(rng, (2, 6, 4))
    rows = {
        "one image": [row(rng, 3, wide, 7), row(rng, small, 4), row(rng, 2, tall, 9), row(rng, 5, wide, 1)],
        "three sizes": [
            row(rng, 3, small, 5, wide, 4, tall, 2),
            row(rng, 9),
            row(rng, tall, 6, small, 2, wide, 3),
            row(rng, 2, wide, wide, small, 1),
        ],
        "no image on one rank": [row(rng, 3, wide, 5), row(rng, 6), row(rng, 11), row(rng, 4)],
        "video frames": [
            row(rng, 3, video, 4, small, 2),
            row(rng, 5),
            row(rng, 2, long_video, 3),
            row(rng, 1, small, 2, video, 6),
        ],
    }
    keys = iter(range(sum(map(len, rows.values()))))
    return {name: tuple(Sample(next(keys), one) for one in of_set) for name, of_set in rows.items()}
