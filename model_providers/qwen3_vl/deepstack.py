"""Where visual features go in a micro-batch, and how DeepStack taps travel between pipeline stages.

Tap k is added at the visual positions after language layer k. A stage that does not hold layer k passes the tap on in
its payload: ``cat([hidden [S_local, B, H], pending tap rows])``. Every stage derives the split from the ids it holds.
Shape suffixes: S tokens, B rows, H hidden, V visual rows, L tokens of this rank, N images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model_providers.qwen3_vl.mrope import frames_of, row_positions
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.engine.batch import Batch
from prism_megatron.errors import DataError
from prism_megatron.parallel.host_to_device import on_device

Ints = npt.NDArray[np.int64]


class VisualPlaces(NamedTuple):
    """Visual positions of a micro-batch and the feature row each one shows, in (token, row) order, on the host."""

    token_V: Ints
    row_V: Ints
    feature_V: Ints

    def of(self, tokens_L: Ints) -> VisualPlaces:
        """Those among the tokens ``tokens_L`` of every row, with token numbers counted in that list."""
        found_V = np.isin(self.token_V, tokens_L)
        sorter = np.argsort(tokens_L)
        local_V = sorter[np.searchsorted(tokens_L, self.token_V[found_V], sorter=sorter)]
        row_V, feature_V = self.row_V[found_V], self.feature_V[found_V]
        order = np.lexsort((row_V, local_V))
        return VisualPlaces(local_V[order], row_V[order], feature_V[order])

    def to(self, device: torch.device) -> VisualRows:
        return VisualRows(*(on_device(index, device) for index in self))


@dataclass(frozen=True, eq=False)
class VisualRows:
    """``VisualPlaces`` on the device that holds the hidden states."""

    token_V: Tensor
    row_V: Tensor
    feature_V: Tensor

    def __len__(self) -> int:
        return len(self.token_V)

    def overwrite(self, hidden_L_B_H: Tensor, rows_V_H: Tensor) -> Tensor:
        """``hidden`` with the visual positions replaced."""
        return hidden_L_B_H.index_put((self.token_V, self.row_V), rows_V_H)

    def add(self, hidden_L_B_H: Tensor, rows_V_H: Tensor) -> Tensor:
        """``hidden`` with ``rows`` added at the visual positions; a new tensor, never a view of one.

        (The pipeline schedule frees what a stage sends, which it refuses to do to a view.)
        """
        at = (self.token_V, self.row_V)
        return hidden_L_B_H.index_put(at, hidden_L_B_H[at] + rows_V_H)


def locate(batch: Batch, shape: Qwen3VLShape) -> tuple[VisualPlaces, Ints]:
    """Visual positions and MRoPE positions ``[3, B, S]`` of a micro-batch.

    Positions restart with every sequence that has no prefix.

    Raises DataError when a sequence's visual tokens do not fit its images.
    """
    ids = batch.host_ids_B_S
    grids = [image.grid_thw for image in batch.images]
    if len(batch.images_by_sequence) != len(batch.lengths):
        raise DataError(f"images_by_sequence names {len(batch.images_by_sequence)} sequences of {len(batch.lengths)}")
    merge = shape.vision.merge
    sizes = [t * h * w // merge**2 for t, h, w in grids]
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    visual = np.isin(ids, (shape.image_token_id, shape.video_token_id))
    positions = np.empty((3, *ids.shape), dtype=np.int64)
    features = np.empty(ids.shape, dtype=np.int64)
    places = batch.places()
    prefixes = batch.prefixes or (None,) * len(places)
    for (row, start), length, slot, images, prefix in zip(
        places, batch.lengths, batch.slots, batch.images_by_sequence, prefixes, strict=True
    ):
        here = slice(start, start + slot)
        visual[row, start + length : start + slot] = False  # padding
        frames = [frame for n in images for frame in frames_of(grids[n], merge)]
        positions[:, row, here] = row_positions(visual[row, here], frames)
        if prefix is not None:
            first = places[prefix][1]
            positions[:, row, here] += positions[:, row, first : first + batch.lengths[prefix]].max() + 1
        if images:
            features[row, here][visual[row, here]] = np.concatenate(
                [np.arange(starts[n], starts[n + 1]) for n in images]
            )
    token_V, row_V = np.nonzero(visual.T)
    return VisualPlaces(token_V, row_V, features[row_V, token_V]), positions


def pending_taps(num_taps: int, first_layer: int) -> range:
    """Taps still travelling when layer ``first_layer`` is about to run."""
    return range(first_layer, max(first_layer, num_taps))


def pack(hidden_S_B_H: Tensor, taps: Sequence[Tensor]) -> Tensor:
    """``[S + ceil(K · V / B), B, H]``: the hidden states followed by K pending taps' rows, zero-padded to whole B."""
    if not taps:
        return hidden_S_B_H
    _, num_rows, hidden = hidden_S_B_H.shape
    flat = torch.cat(list(taps))
    padding = flat.new_zeros((-len(flat) % num_rows, hidden))
    return torch.cat([hidden_S_B_H, torch.cat([flat, padding]).view(-1, num_rows, hidden)])


def unpack(payload: Tensor, *, num_tokens: int, num_visual: int, pending: range) -> tuple[Tensor, Mapping[int, Tensor]]:
    """Undo ``pack``: hidden states of ``num_tokens`` and the pending taps by number, ``[num_visual, H]`` each."""
    rows = payload[num_tokens:].flatten(0, 1)
    return payload[:num_tokens], {
        tap: rows[slot * num_visual : (slot + 1) * num_visual] for slot, tap in enumerate(pending)
    }
