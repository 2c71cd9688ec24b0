"""Interleaved multimodal rotary positions (MRoPE) of Qwen3-VL.

Every token has three positions: time, height, width. Text advances all three together; the tokens of a frame lie on
its merged grid; the text after a frame goes on at its start plus the longer side of the grid. Matches
``get_rope_index`` and ``Qwen3VLTextRotaryEmbedding`` of transformers 5.23.
Shape suffixes: B rows, S tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prism_megatron.errors import DataError


class Frame(NamedTuple):
    """One frame of one image in merged units: ``height · width`` visual tokens."""

    height: int
    width: int


def frames_of(grid_thw: Sequence[int], merge: int) -> list[Frame]:
    """The frames of one grid given in patches; each frame of a video is a run of visual tokens of its own."""
    frames, height, width = grid_thw
    return [Frame(height // merge, width // merge)] * frames


def row_positions(visual: npt.NDArray[np.bool_], frames: Sequence[Frame]) -> npt.NDArray[np.int64]:
    """Positions ``[3, S]`` of one sequence, whose visual tokens (``visual [S]``) show ``frames`` in order.

    Raises DataError when the visual tokens do not fit the frames.
    """
    length = len(visual)
    positions = np.empty((3, length), dtype=np.int64)
    visual_at = np.flatnonzero(visual)
    if len(visual_at) != sum(frame.height * frame.width for frame in frames):
        raise DataError(
            f"a sequence has {len(visual_at)} image tokens, but its images {[tuple(frame) for frame in frames]} "
            "(merged height and width of each frame) need a different number; "
            "expand each image pad to h · w / merge² tokens"
        )
    token, position, consumed = 0, 0, 0
    for frame in frames:
        start, size = int(visual_at[consumed]), frame.height * frame.width
        if visual_at[consumed + size - 1] != start + size - 1:
            raise DataError(f"the {size} tokens of an image frame at token {start} of a sequence are not contiguous")
        text = start - token
        positions[:, token:start] = position + np.arange(text)
        position += text
        end = start + size
        positions[0, start:end] = position
        positions[1, start:end] = position + np.repeat(np.arange(frame.height), frame.width)
        positions[2, start:end] = position + np.tile(np.arange(frame.width), frame.height)
        position += max(frame.height, frame.width)
        token, consumed = end, consumed + size
    positions[:, token:] = position + np.arange(length - token)
    return positions


def rotary_tables(
    positions_3_B_S: Tensor, *, head_dim: int, theta: float, mrope_section: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin ``[S, B, 1, D]`` of every token's angles, computed in float32 and then cast to ``dtype``.

    Frequencies 1, 4, 7, … turn with height and 2, 5, 8, … with width, as many as ``mrope_section`` says; the rest with
    time. The frequencies are computed here, never stored: a buffer would be rounded with the model's dtype.
    """
    device = positions_3_B_S.device
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    per_axis = positions_3_B_S[..., None].float() * (1.0 / theta**exponent)
    angles_B_S_F = per_axis[0].clone()
    for axis in (1, 2):
        picked = slice(axis, 3 * mrope_section[axis], 3)
        angles_B_S_F[..., picked] = per_axis[axis][..., picked]
    angles_S_B_1_D = torch.cat((angles_B_S_F, angles_B_S_F), dim=-1).transpose(0, 1).unsqueeze(2).contiguous()
    return angles_S_B_1_D.cos().to(dtype), angles_S_B_1_D.sin().to(dtype)
