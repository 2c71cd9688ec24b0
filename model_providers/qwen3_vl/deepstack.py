"""Where visual features go in a micro-batch, and how DeepStack taps travel between pipeline stages.

Tap k is added at the visual positions after language layer k. A stage that does not hold layer k passes the tap on in
its payload: ``cat([hidden [S_local, B, H], pending tap rows])``. Every stage derives the split from the ids it holds.
Visual rows are ordered by (token, row), so that the rows of one sequence-parallel rank are one contiguous run.
Shape suffixes: S tokens, B rows, H hidden, V visual rows, R feature rows of the vision tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_providers.qwen3_vl.mrope import frames_of, row_positions
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.engine.batch import Batch
from prism_megatron.errors import DataError


@dataclass(frozen=True, eq=False)
class VisualRows:
    """Visual positions and the feature row each one shows, in (token, row) order."""

    token_V: Tensor
    row_V: Tensor
    feature_V: Tensor

    def __len__(self) -> int:
        return len(self.token_V)

    def local(self, tokens_per_rank: int, rank: int) -> VisualRows:
        """The rows of one sequence-parallel rank, with token numbers in its own chunk."""
        start, end = (
            int(bound)
            for bound in torch.searchsorted(
                self.token_V, torch.tensor([rank, rank + 1], device=self.token_V.device) * tokens_per_rank
            )
        )
        return VisualRows(
            self.token_V[start:end] - rank * tokens_per_rank, self.row_V[start:end], self.feature_V[start:end]
        )

    def overwrite(self, hidden_S_B_H: Tensor, rows_V_H: Tensor) -> Tensor:
        """``hidden`` with the visual positions replaced."""
        return hidden_S_B_H.index_put((self.token_V, self.row_V), rows_V_H)

    def add(self, hidden_S_B_H: Tensor, rows_V_H: Tensor) -> Tensor:
        """``hidden`` with ``rows`` added at the visual positions; a new tensor, never a view of one.

        (The pipeline schedule frees what a stage sends, which it refuses to do to a view.)
        """
        at = (self.token_V, self.row_V)
        return hidden_S_B_H.index_put(at, hidden_S_B_H[at] + rows_V_H)


def locate(batch: Batch, shape: Qwen3VLShape) -> tuple[VisualRows, Tensor]:
    """Visual rows and MRoPE positions ``[3, B, S]`` of a micro-batch, both on the batch's device.

    Raises DataError when a row's visual tokens do not fit its images.
    """
    ids = batch.input_ids_B_S.cpu().numpy()
    lengths = batch.lengths_B.cpu().numpy()
    grids = batch.grid_thw_N_3.tolist()
    if len(batch.images_by_row) != len(ids):
        raise DataError(f"images_by_row names {len(batch.images_by_row)} rows of {len(ids)}")
    merge = shape.vision.merge
    sizes = [t * h * w // merge**2 for t, h, w in grids]
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    visual = np.isin(ids, (shape.image_token_id, shape.video_token_id))
    visual &= np.arange(ids.shape[1])[None, :] < lengths[:, None]

    positions = np.empty((3, *ids.shape), dtype=np.int64)
    features = np.empty(ids.shape, dtype=np.int64)
    for b, images in enumerate(batch.images_by_row):
        frames = [frame for n in images for frame in frames_of(grids[n], merge)]
        positions[:, b] = row_positions(visual[b], frames)
        if images:
            features[b, visual[b]] = np.concatenate([np.arange(starts[n], starts[n + 1]) for n in images])
    token, row = (np.ascontiguousarray(index) for index in np.nonzero(visual.T))
    device = batch.input_ids_B_S.device
    rows = VisualRows(
        token_V=torch.from_numpy(token).to(device),
        row_V=torch.from_numpy(row).to(device),
        feature_V=torch.from_numpy(features[row, token]).to(device),
    )
    return rows, torch.from_numpy(positions).to(device)


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
