"""A row as keyword arguments of the ``forward`` of transformers' Qwen3-VL."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.types import TokenSequence


def transformers_inputs(row: TokenSequence, shape: Qwen3VLShape, device: torch.device) -> dict[str, Tensor]:
    """``[1, S]`` ids (int64) and token types (int32); ``[P, D]`` float32 pixels with their ``[N, 3]`` grids.

    Images of more than one frame are videos. Pixels and grids are left out where there are none.
    """
    ids = torch.tensor([row.token_ids], device=device)
    types = (ids == shape.image_token_id).int() + 2 * (ids == shape.video_token_id).int()
    inputs = {"input_ids": ids, "mm_token_type_ids": types}
    for kind, pixels, is_video in (("image", "pixel_values", False), ("video", "pixel_values_videos", True)):
        shown = [one for one in row.images if (one.grid_thw[0] > 1) == is_video]
        if shown:
            inputs[pixels] = torch.from_numpy(np.concatenate([one.pixel_values_P_D for one in shown])).to(device)
            inputs[f"{kind}_grid_thw"] = torch.tensor([one.grid_thw for one in shown], device=device)
    return inputs
