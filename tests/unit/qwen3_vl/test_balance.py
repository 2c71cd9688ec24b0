"""How images are shared out over ranks, and what is kept of them between micro-batches.

That sharing changes no gradient is shown in ``tests/parity/test_qwen3_vl.py``.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_providers.qwen3_vl.balance import assign, num_patches, visual_features
from model_providers.qwen3_vl.vision import VisionModel
from prism_megatron.engine.batch import collate
from prism_megatron.engine.runtime import World
from prism_megatron.engine.vision.images import SharedImages
from prism_megatron.parity.samples import PAD, image, row
from tests.distributed import tiny


def test_images_are_shared_out_by_their_cost() -> None:
    """Claim: the costliest go first, each to the rank with the least so far; a rank has its own in their order."""
    assert assign([2, 9, 3, 8, 2, 1], 2) == [[0, 1, 4], [2, 3, 5]]


@settings(deadline=None, max_examples=40)
@given(costs=st.lists(st.integers(1, 30), max_size=7), num_ranks=st.integers(1, 3))
def test_no_rank_has_more_than_four_thirds_of_what_it_need_have(costs: list[int], num_ranks: int) -> None:
    """Claim: every image once, and the largest load within 4/3 of the best of all assignments (Graham)."""
    shares = assign(costs, num_ranks)
    assert sorted(itertools.chain.from_iterable(shares)) == list(range(len(costs)))
    best = min(
        max(sum(cost for cost, rank in zip(costs, ranks, strict=True) if rank == r) for r in range(num_ranks))
        for ranks in itertools.product(range(num_ranks), repeat=len(costs))
    )
    assert 3 * max(sum(costs[item] for item in share) for share in shares) <= 4 * best


def test_kept_features_are_copies_of_one_image(world: World) -> None:
    """Claim: of images that are encoded together each keeps its own features alive, and they are the right ones."""
    rng = np.random.default_rng(0)
    shown = [image(rng, grid) for grid in ((1, 2, 4), (1, 4, 4))]
    vision = tiny.build(world, optimizer=None).modules[0].vision_model
    assert isinstance(vision, VisionModel)
    batch = collate([row(rng, 3, *shown)], pad_token_id=PAD, multiple_of=1, device=world.device)
    pending = SharedImages([shown, shown])
    found = visual_features(vision, dataclasses.replace(batch, shared_images=pending), world.groups.cp)
    assert len(pending) == 2
    start = 0
    for one in shown:
        rows = num_patches(one) // vision.shape.merge**2
        for kept, whole in zip(pending.take(one), found, strict=True):
            assert torch.equal(kept, whole[start : start + rows])
            assert kept.untyped_storage().nbytes() == kept.nbytes
        start += rows
