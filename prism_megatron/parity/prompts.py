"""Samples through a folder's own chat template and image preprocessor: questions about pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from prism_megatron.data.pictures.files import open_image
from prism_megatron.data.render import Renderer
from prism_megatron.data.scenes import make_scene
from prism_megatron.parity.probe import Sample
from prism_megatron.types import TokenSequence

MIN_SAMPLES = 3
SIZES = ((96, 96), (160, 96), (64, 192))
"""Width and height in pixels of the built-in pictures; the preprocessor enlarges them to its least size."""


def prompted_samples(folder: Path, images: Sequence[str], count: int) -> list[Sample]:
    """At least ``count`` samples: some text only, some with one picture, some with several of different sizes.

    ``images`` are files to show instead of the built-in scenes. Raises DataError for a file that cannot be read and
    for a folder without tokenizer, template or preprocessor.
    """
    renderer = Renderer.from_folder(folder)
    pictures = [open_image(Path(path)) for path in images]
    made = []
    for index in range(max(MIN_SAMPLES, count)):
        scene = make_scene("heldout", seed=0, index=index)
        shown = _pictures(index, pictures or [scene.image().resize(size) for size in SIZES])
        prompt = renderer.prompt(f"sample {index}", scene.question.text, shown)
        made.append(Sample(index, TokenSequence(prompt.token_ids, prompt.images)))
    return made


def _pictures(index: int, pictures: Sequence[Image.Image]) -> Sequence[Image.Image]:
    """All of them, none, or one in turn."""
    if index % MIN_SAMPLES == 0:
        return pictures
    return [] if index % MIN_SAMPLES == 1 else [pictures[index // MIN_SAMPLES % len(pictures)]]
