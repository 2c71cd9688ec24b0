"""Positions and angles equal transformers'; broken rows are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel, Qwen3VLTextRotaryEmbedding

from model_providers.qwen3_vl.mrope import Frame, frames_of, rotary_tables, row_positions
from prism_megatron.errors import DataError
from prism_megatron.parity.samples import IMAGE, VIDEO, image, row
from prism_megatron.parity.tiny import tiny_config

PARTS = st.lists(
    st.one_of(
        st.integers(1, 6),
        st.tuples(st.integers(1, 3), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 8])),
    ),
    min_size=1,
    max_size=5,
)


class _Config:
    """What ``get_rope_index`` reads of a model: its config. (A method taken from the class, without its weights.)"""

    config = Qwen3VLConfig.from_dict(tiny_config())
    get_vision_position_ids = Qwen3VLModel.get_vision_position_ids


@settings(deadline=None, max_examples=40)
@given(parts=PARTS)
def test_positions_equal_get_rope_index(parts: list[int | tuple[int, int, int]]) -> None:
    """Claim: equal for any sequence of text, images and videos, frames being runs of their own."""
    rng = np.random.default_rng(0)
    sequence = row(rng, *(part if isinstance(part, int) else image(rng, part) for part in parts))
    ids = torch.tensor([sequence.token_ids])
    types = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    grids = {is_video: [i.grid_thw for i in sequence.images if (i.grid_thw[0] > 1) == is_video] for is_video in (0, 1)}
    expected, _ = Qwen3VLModel.get_rope_index(
        _Config(),
        ids,
        types,
        image_grid_thw=torch.tensor(grids[0]) if grids[0] else None,
        video_grid_thw=torch.tensor(grids[1]) if grids[1] else None,
    )
    frames = [frame for one in sequence.images for frame in frames_of(one.grid_thw, 2)]
    ours = row_positions((types[0] > 0).numpy(), frames)
    assert torch.equal(torch.from_numpy(ours), expected[:, 0])


def test_rows_that_do_not_fit_their_images_are_refused() -> None:
    visual = np.array([False, True, True, True, True, False])
    with pytest.raises(DataError, match="4 image tokens"):
        row_positions(visual, [Frame(2, 3)])
    with pytest.raises(DataError, match="not contiguous"):
        row_positions(np.array([True, True, False, True, True]), [Frame(2, 2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_equal_transformers_rotary(dtype: torch.dtype) -> None:
    """Claim: cos and sin are bit-equal to transformers' for three independent streams.

    In bf16 too, which has no room for positions beyond 256: the cast comes last.
    """
    config = Qwen3VLConfig.from_dict(tiny_config()).text_config
    positions = torch.randint(0, 5000, (3, 2, 7), generator=torch.Generator().manual_seed(1))
    cos, sin = Qwen3VLTextRotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions)
    ours = rotary_tables(positions, head_dim=16, theta=1e4, mrope_section=(4, 2, 2), dtype=dtype)
    assert torch.equal(ours[0].squeeze(2).transpose(0, 1), cos)
    assert torch.equal(ours[1].squeeze(2).transpose(0, 1), sin)


def sines(positions: torch.Tensor, mrope_section: tuple[int, int, int]) -> torch.Tensor:
    """Of one token's angles, ``[D]``."""
    head_dim = 2 * sum(mrope_section)
    _, sin = rotary_tables(positions, head_dim=head_dim, theta=1e4, mrope_section=mrope_section, dtype=torch.float32)
    return sin.flatten()


@pytest.mark.parametrize("mrope_section", [(4, 2, 2), (24, 20, 20)])
def test_the_streams_take_the_published_frequencies(mrope_section: tuple[int, int, int]) -> None:
    """Claim: 1, 4, 7, … turn with height, 2, 5, 8, … with width, others with time; equal streams are plain RoPE."""
    head_dim = 2 * sum(mrope_section)
    one_axis = [torch.zeros(3, 1, 1) for _ in range(3)]
    owners = []
    for axis, positions in enumerate(one_axis):
        positions[axis] = 1.0
        turned = sines(positions, mrope_section)
        owners.append(set(torch.nonzero(turned[: sum(mrope_section)]).flatten().tolist()))
    assert owners[1] == {1 + 3 * i for i in range(mrope_section[1])}
    assert owners[2] == {2 + 3 * i for i in range(mrope_section[2])}
    assert owners[0] == set(range(head_dim // 2)) - owners[1] - owners[2]
    plain = 7.0 / 1e4 ** (torch.arange(0, head_dim, 2) / head_dim)
    torch.testing.assert_close(sines(torch.full((3, 1, 1), 7), mrope_section), torch.cat((plain, plain)).sin())
