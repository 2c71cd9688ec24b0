"""Image features that the micro-batches of one pass share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from prism_megatron.engine.vision.cache import VisionCache
from prism_megatron.types import ImageInput


class SharedImages:
    """What a vision tower made of each image, kept from the first micro-batch that shows it to the last.

    For features without a gradient only: those of a frozen tower, or of a forward pass. Images are told apart by object
    identity, as in ``engine.batch``. Micro-batches that show one image should follow one another, so that few are kept.
    """

    def __init__(self, shown: Iterable[Sequence[ImageInput]] = (), *, cache: VisionCache | None = None) -> None:
        """``shown`` lists the images of every micro-batch of the pass, each once a micro-batch.

        ``cache`` has images of earlier passes, and gets those of this one.
        """
        self._cache = cache
        self._uses = Counter(image for images in shown for image in images)
        self._features: dict[ImageInput, tuple[Tensor, ...]] = {}

    def __len__(self) -> int:
        """Images kept at present."""
        return len(self._features)

    def missing(self, images: Sequence[ImageInput], device: torch.device) -> list[ImageInput]:
        """Those of ``images`` that have to be encoded before they can be taken; what a cache has comes to ``device``.

        The same on all ranks that share the micro-batch, which call together.
        """
        unknown = [image for image in images if image not in self._features]
        if self._cache is None or not unknown:
            return unknown
        self._features |= self._cache.recall(unknown, device)
        return [image for image in unknown if image not in self._features]

    def keep(self, image: ImageInput, features: tuple[Tensor, ...]) -> None:
        """Remember ``features`` (see ``take``)."""
        self._features[image] = features
        if self._cache is not None:
            self._cache.keep(image, features)

    def take(self, image: ImageInput) -> tuple[Tensor, ...]:
        """An image's features for one micro-batch; its last one lets go of them."""
        self._uses[image] -= 1
        return self._features[image] if self._uses[image] > 0 else self._features.pop(image)
