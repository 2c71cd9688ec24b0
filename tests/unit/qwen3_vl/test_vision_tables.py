"""The vision tower's tables equal transformers' for images of any size."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLVisionBlock,
    Qwen3VLVisionConfig,
    Qwen3VLVisionPatchMerger,
    apply_rotary_pos_emb_vision,
)
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from model_providers.qwen3_vl.vision import EPS, interpolation, patch_coordinates, rotary_table, rotate

GRIDS = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 30).map(lambda n: 2 * n), st.integers(1, 30).map(lambda n: 2 * n)),
    min_size=1,
    max_size=3,
)


@settings(deadline=None, max_examples=30)
@given(grids=GRIDS, side=st.sampled_from([7, 48]))
def test_coordinates_and_interpolation(grids: list[tuple[int, int, int]], side: int) -> None:
    """Claim: coordinates are equal; interpolated values of a random table agree to 1e-6, whichever neighbours
    carry weight 0."""
    grid = torch.tensor(grids)
    assert torch.equal(patch_coordinates(grids, 2), get_vision_position_ids(grid, 2))
    indices, weights = interpolation(grids, 2, side)
    theirs, their_weights = get_vision_interpolation_indices_and_weights(
        grid, num_grid_per_side=side, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    table = torch.randn(side * side, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        (table[indices] * weights).sum(1), (table[theirs] * their_weights).sum(1), atol=1e-6, rtol=0
    )


def test_rotation_is_relative_in_rows_and_columns() -> None:
    """Claim: scores depend on the offset between two patches only; moving both by one row or column changes nothing."""
    cos, sin = rotary_table([(1, 8, 8)], 2, 8)
    at = {tuple(place): n for n, place in enumerate(patch_coordinates([(1, 8, 8)], 2).tolist())}
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 8).unbind()

    def score(a: tuple[int, int], b: tuple[int, int]) -> float:
        turned = (rotate(x, cos[at[p]][None], sin[at[p]][None]) for x, p in ((query, a), (key, b)))
        return float(torch.stack(list(turned)).prod(0).sum())

    assert abs(score((1, 2), (3, 5)) - score((2, 2), (4, 5))) < 1e-5
    assert abs(score((1, 2), (3, 5)) - score((1, 1), (3, 4))) < 1e-5
    assert abs(score((1, 2), (3, 5)) - score((1, 2), (5, 3))) > 1e-2


def test_rotation_in_bf16_is_computed_in_float32() -> None:
    """Claim: equal in every bit to transformers', which casts once, at the end."""
    cos, sin = rotary_table([(1, 8, 8)], 2, 8)
    query, key = torch.randn(2, 64, 3, 8).bfloat16()
    expected = apply_rotary_pos_emb_vision(query, key, cos[:, 0], sin[:, 0])
    for ours, theirs in zip((rotate(x, cos, sin) for x in (query, key)), expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs)


def test_norms_add_the_epsilon_of_transformers() -> None:
    """Claim: it stands in no config file, so transformers' modules say it."""
    config = Qwen3VLVisionConfig(hidden_size=16, num_heads=2, depth=1, intermediate_size=16)
    block, merger = Qwen3VLVisionBlock(config), Qwen3VLVisionPatchMerger(config)
    assert {block.norm1.eps, block.norm2.eps, merger.norm.eps} == {EPS}
