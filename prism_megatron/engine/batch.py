"""A micro-batch as every rank of a model-parallel group holds it.

Shape suffixes: B rows, S tokens (padded), P patches of all images, D pixels per patch, N images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from prism_megatron.types import ImageInput, TokenSequence


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded rows with their images.

    ``images_by_row[b]`` lists, in order of appearance, which of the N images row b shows: rows that show the
    same image name the same index, and the vision tower runs once for it. ``extras`` holds what a loss needs:
    per-token tensors ``[B, S]`` or per-row tensors ``[B]``. Padding lies on the right and is never read.
    """

    input_ids_B_S: Tensor
    lengths_B: Tensor
    pixel_values_P_D: Tensor
    grid_thw_N_3: Tensor
    images_by_row: tuple[tuple[int, ...], ...]
    tower_ids_B: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


def collate(
    rows: Sequence[TokenSequence],
    *,
    pad_token_id: int,
    multiple_of: int,
    patch_dim: int,
    device: torch.device,
    tower_ids: Sequence[int] | None = None,
    token_extras: Mapping[str, Sequence[Sequence[float]]] | None = None,
    row_extras: Mapping[str, Sequence[float] | Sequence[int]] | None = None,
) -> Batch:
    """Pad rows on the right to one length, a multiple of ``multiple_of`` (tp for sequence parallelism).

    ``token_extras`` are per-token float lists as long as their row; they are padded with 0. ``row_extras`` hold one
    number a row: ints become int64, floats float32.
    Images are deduplicated by object identity.
    """
    lengths = [len(row.token_ids) for row in rows]
    padded = -(-max(lengths) // multiple_of) * multiple_of
    input_ids = np.full((len(rows), padded), pad_token_id, dtype=np.int64)
    for b, row in enumerate(rows):
        input_ids[b, : lengths[b]] = row.token_ids

    images: list[ImageInput] = []
    index_of: dict[int, int] = {}
    for row in rows:
        for image in row.images:
            if id(image) not in index_of:
                index_of[id(image)] = len(images)
                images.append(image)
    if images:
        pixels = np.concatenate([image.pixel_values_P_D for image in images])
    else:
        pixels = np.zeros((0, patch_dim), dtype=np.float32)

    extras: dict[str, Tensor] = {}
    for name, values in (token_extras or {}).items():
        table = np.zeros((len(rows), padded), dtype=np.float32)
        for b, row_values in enumerate(values):
            if len(row_values) != lengths[b]:
                raise ValueError(f"extra {name!r} has {len(row_values)} values for a row of {lengths[b]} tokens")
            table[b, : lengths[b]] = row_values
        extras[name] = torch.from_numpy(table).to(device)
    for name, per_row in (row_extras or {}).items():
        extras[name] = torch.tensor(list(per_row), device=device)

    return Batch(
        input_ids_B_S=torch.from_numpy(input_ids).to(device),
        lengths_B=torch.tensor(lengths, dtype=torch.int64, device=device),
        pixel_values_P_D=torch.from_numpy(pixels).to(device),
        grid_thw_N_3=torch.tensor([image.grid_thw for image in images], dtype=torch.int64).reshape(-1, 3),
        images_by_row=tuple(tuple(index_of[id(image)] for image in row.images) for row in rows),
        tower_ids_B=None if tower_ids is None else torch.tensor(list(tower_ids), dtype=torch.int64, device=device),
        extras=extras,
    )
