"""What a frozen vision tower makes of images, kept on disk from run to run.

A key is the hash of the tower's weights, of the format that it computes in and of an image's patches as the tower reads
them. Preprocessing is in it by what it does: other limits, means or patch sizes give other patches, or the same ones in
another grid, which is in it too. An image is therefore read and preprocessed before it can be found.

Shape suffixes: T features and taps, R merged feature rows, H hidden, N images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from prism_megatron.engine.vision.feature_files import FeatureFiles
from prism_megatron.types import ImageInput

_FORM = "features and taps [T, R, H], 1"
"""What a file holds; another form needs another name."""


@dataclass
class CacheCounts:
    """Images that were looked for on disk, those that were there, and those that cannot be."""

    images: int = 0
    found: int = 0
    too_large: int = 0
    """whose features are too many for the folder's bound, and are encoded at every epoch"""


class VisionCache:
    """Features of single images, alike on every rank that shares a micro-batch."""

    def __init__(self, files: FeatureFiles, *, tower: str, group: dist.ProcessGroup, writes: bool) -> None:
        """``tower`` identifies weights and dtype; ``group`` holds the ranks that share a micro-batch.

        One of them ``writes``.
        """
        self._files, self._tower = files, tower
        self._group, self._writes = group, writes
        self._counts = CacheCounts()
        self._keys: dict[ImageInput, str] = {}
        """of those that are missing: hashing takes a while"""

    def recall(self, images: Sequence[ImageInput], device: torch.device) -> dict[ImageInput, tuple[Tensor, ...]]:
        """Features and taps ``[R, H]`` of those images that every rank of the group found; all of them call together.

        Ranks must agree, for those that lack an image run the tower on it together. One small all-reduce.
        """
        self._keys = {image: self.key(image) for image in images}
        kept = [self._files.find(key) for key in self._keys.values()]
        found_N = torch.tensor([features is not None for features in kept], dtype=torch.int32, device=device)
        if self._group.size() > 1:
            dist.all_reduce(found_N, op=dist.ReduceOp.MIN, group=self._group)
        agreed = {
            image: features.to(device).unbind()
            for image, features, found in zip(images, kept, found_N.tolist(), strict=True)
            if found and features is not None
        }
        if self._writes:
            self._counts.images += len(images)
            self._counts.found += len(agreed)
        return agreed

    def keep(self, image: ImageInput, features: tuple[Tensor, ...]) -> None:
        """Write the features of an image that was not found, on the rank that writes."""
        if self._writes:
            fits = self._files.keep(self._keys.pop(image), torch.stack(features).cpu())
            self._counts.too_large += not fits

    def key(self, image: ImageInput) -> str:
        """By what an image is found."""
        digest = hashlib.sha256(f"{_FORM} {self._tower} {image.grid_thw} {image.pixel_values_P_D.shape}".encode())
        digest.update(image.pixel_values_P_D.data)
        return digest.hexdigest()

    def take_counts(self) -> CacheCounts:
        """Counts since the last call; 0 on ranks that do not write."""
        counts, self._counts = self._counts, CacheCounts()
        return counts

    @property
    def failure(self) -> str | None:
        """Why nothing is written any more, if so."""
        return self._files.failure
