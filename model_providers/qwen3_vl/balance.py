"""Every image is encoded once: context-parallel ranks share out a micro-batch's, and micro-batches share features.

Shape suffixes: P patches, D pixels per patch, N images, R merged feature rows, H hidden.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from model_providers.qwen3_vl.vision import VisionModel
from prism_megatron.engine.batch import Batch
from prism_megatron.parallel.host_to_device import on_device
from prism_megatron.types import ImageInput


def assign(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Items of each rank: the costliest first, each to the rank with the least so far (Graham's LPT rule).

    The largest sum exceeds the best possible by a third at most. The same on every rank.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(item)
        heapq.heappush(loads, (load + costs[item], rank))
    return [sorted(share) for share in shares]


def visual_features(vision: VisionModel, batch: Batch, group: ProcessGroup) -> list[Tensor]:
    """Features and taps ``[R, H]`` of a micro-batch's images in their order, on every rank of the ``group``.

    Where no gradient goes back to the tower, it runs without autograd, and the micro-batches of a pass share what it
    makes (``batch.shared_images``), which a cache on disk may have already.
    """
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in vision.parameters()):
        return encode(vision, batch.images, batch.input_ids_B_S.device, group)
    with torch.no_grad():
        return _shared_features(vision, batch, group)


def _shared_features(vision: VisionModel, batch: Batch, group: ProcessGroup) -> list[Tensor]:
    device = batch.input_ids_B_S.device
    if not batch.images:
        return encode(vision, batch.images, device, group)
    missing = batch.shared_images.missing(batch.images, device)
    if missing:
        rows = [num_patches(image) // vision.shape.merge**2 for image in missing]
        columns = [output.split(rows) for output in encode(vision, missing, device, group)]
        for image, *features in zip(missing, *columns, strict=True):
            # Copies: a view would hold the features of all images encoded with it.
            batch.shared_images.keep(image, tuple(part.clone() for part in features))
    taken = [batch.shared_images.take(image) for image in batch.images]
    return [torch.cat(parts) for parts in zip(*taken, strict=True)]


def encode(
    vision: VisionModel, images: Sequence[ImageInput], device: torch.device, group: ProcessGroup
) -> list[Tensor]:
    """Features and taps ``[R, H]`` of ``images``, on every rank of the context-parallel ``group``.

    Each rank runs its share; one all-gather brings them together, and its backward sums over the ranks what their
    tokens make of each image. A rank without images runs the tower's empty block and enters the same collectives.
    """
    patches = [num_patches(image) for image in images]
    shares = assign(patches, group.size())
    mine = [images[n] for n in shares[group.rank()]]
    outputs = vision(on_device(pixels_of(mine, vision.shape.patch_dim), device), [image.grid_thw for image in mine])
    if group.size() == 1:
        return list(outputs)

    num_rows = [count // vision.shape.merge**2 for count in patches]
    height = max(1, *(sum(num_rows[n] for n in share) for share in shares))
    own = torch.cat(outputs, dim=-1)
    own = torch.nn.functional.pad(own, (0, 0, 0, height - len(own)))
    gathered = gather_from_sequence_parallel_region(own, group=group)

    place_of = {}
    for rank, share in enumerate(shares):
        start = rank * height
        for n in share:
            place_of[n] = np.arange(start, start + num_rows[n])
            start += num_rows[n]
    order = np.concatenate([np.empty(0, dtype=np.int64), *(place_of[n] for n in range(len(images)))])
    in_order = gathered.index_select(0, on_device(order, gathered.device))
    return list(in_order.chunk(len(outputs), dim=-1))


def num_patches(image: ImageInput) -> int:
    frames, height, width = image.grid_thw
    return frames * height * width


def pixels_of(images: Sequence[ImageInput], patch_dim: int) -> Tensor:
    """Patches of all images ``[P, D]``, in host memory."""
    none = np.zeros((0, patch_dim), dtype=np.float32)
    return torch.from_numpy(np.concatenate([none, *(image.pixel_values_P_D for image in images)]))
