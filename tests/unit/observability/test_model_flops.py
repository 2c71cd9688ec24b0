"""The arithmetic of a step, against what torch counts in transformers' own model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageTextToText

from prism_megatron.config.architecture.model import FreezeGroup
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.observability.model_flops import Arithmetic, Work, peak_of, work_of
from prism_megatron.parity.tiny import tiny_config

GRIDS = ((1, 4, 6), (1, 8, 4))


@pytest.mark.parametrize("num_experts", [0, 8], ids=["dense", "experts"])
def test_forward_is_what_torch_counts_in_transformers(num_experts: int) -> None:
    """Claim: within 0.5 % (rotary angles are a product there), where attention is not causal: it masks what it made."""
    config = tiny_config(num_experts=num_experts)
    shape = Qwen3VLShape.from_dict(config)
    made = AutoConfig.for_model(**config)
    model = AutoModelForImageTextToText.from_config(
        made,
        attn_implementation="eager",
        experts_implementation="eager",  # torch counts no grouped products
    ).eval()
    grids, merge = list(GRIDS), shape.vision.merge
    ids = [5, 6]
    for _, height, width in grids:
        ids += [shape.vision_start_token_id, *[shape.image_token_id] * (height * width // merge**2),
                shape.vision_end_token_id]  # fmt: skip
    ids += list(range(7, 40))
    patches = sum(height * width for _, height, width in grids)
    generator = torch.Generator().manual_seed(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            input_ids=torch.tensor([ids]),
            pixel_values=torch.randn(patches, shape.vision.patch_dim, generator=generator),
            image_grid_thw=torch.tensor(grids),
            mm_token_type_ids=torch.tensor([[int(token == shape.image_token_id) for token in ids]]),
        )
    work = work_of(len(ids), len(ids), grids, merge=merge)
    work = dataclasses.replace(work, pairs=len(ids) ** 2)
    arithmetic = Arithmetic.of(shape)
    ours = 2 * (arithmetic.language(work) + arithmetic.tower(work) + arithmetic.projector(work))
    assert ours == pytest.approx(counter.get_total_flops(), rel=5e-3)


def test_a_frozen_tower_counts_once_and_one_from_disk_not_at_all() -> None:
    """Claim: by hand, of parts that cost 1 each; a projector that trains over a frozen tower counts three times."""
    one = Arithmetic(1, 0, 0, 1, 0, 1)
    work = Work(tokens=100, patches=10, merged=1)
    cases: tuple[tuple[tuple[FreezeGroup, ...], float, float], ...] = (
        ((), 0.0, 2 * (300 + 30 + 3)),
        (("vision",), 0.0, 2 * (300 + 10 + 3)),
        (("vision", "projector"), 0.0, 2 * (300 + 10 + 1)),
        (("vision", "projector"), 0.25, 2 * (300 + 0.75 * 11)),
        (("vision", "projector"), 1.0, 2 * 300),
    )
    for freeze, disk, wanted in cases:
        assert one.training_flops(work, freeze=freeze, from_disk=disk) == wanted


def test_pairs_are_those_of_a_causal_sequence_and_of_a_frame() -> None:
    work = work_of(4, 2, [(2, 2, 4)], merge=2)
    seen = np.tril(np.ones((4, 4))).sum()
    assert work == Work(tokens=4, pairs=seen, labels=2, patches=16, patch_pairs=2 * 64, merged=4)
    assert work + work == work_of(0, 0, [], merge=2) + Work(8, 2 * seen, 4, 32, 256, 8)


def test_only_a_known_device_has_a_peak() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == peak_of("NVIDIA H200") == 989.4
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak_of("NVIDIA GeForce RTX 4090") is None
