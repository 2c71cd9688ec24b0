"""Sharing the images of a micro-batch between context-parallel ranks, which would all run the same ones otherwise.

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


def visual_features(vision: VisionModel, pixels_P_D: Tensor, grid_thw_N_3: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Features and taps ``[R, H]`` of all images in their order, on every rank of the context-parallel ``group``.

    Each rank runs its share; one all-gather brings them together, and its backward sums over the ranks what their
    tokens make of each image. A rank without images runs the tower's empty block and enters the same collectives.
    """
    grids = grid_thw_N_3.tolist()
    if group.size() == 1:
        return list(vision(pixels_P_D, grids))
    patches = [frames * height * width for frames, height, width in grids]
    starts = np.cumsum([0, *patches])
    shares = assign(patches, group.size())
    mine = shares[group.rank()]
    own_pixels = [pixels_P_D[starts[n] : starts[n + 1]] for n in mine]
    outputs = vision(torch.cat(own_pixels) if mine else pixels_P_D[:0], [grids[n] for n in mine])

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
    order = np.concatenate([np.empty(0, dtype=np.int64), *(place_of[n] for n in range(len(grids)))])
    in_order = gathered.index_select(0, torch.from_numpy(order).to(gathered.device))
    return list(in_order.chunk(len(outputs), dim=-1))
