"""Tokens and FLOPs a second, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prism_megatron.engine.runtime import World
from prism_megatron.observability.model_flops import Arithmetic
from prism_megatron.stages.sft.demonstrations import Row
from prism_megatron.stages.sft.throughput import Throughput, peak_here
from prism_megatron.types import ImageInput, TokenSequence


def test_a_steps_figures_are_those_of_its_rows(world: World) -> None:
    """Claim: 6 tokens, 13 pairs of two sequences that do not see each other, 3 labels, 16 patches in one frame.

    A quarter of the images came from disk.
    """
    arithmetic = Arithmetic(token=1e9, pair=1e8, label=1e7, patch=1e6, patch_pair=1e5, merged=1e4)
    throughput = Throughput(arithmetic, 2, ("vision", "projector"), peak_tflops=0.1)
    image = ImageInput(np.zeros((16, 1), dtype=np.float32), (1, 4, 4))
    row = Row(
        ((TokenSequence((1, 2, 3, 4), (image,)), [0.0, 0.0, 1.0, 1.0]), (TokenSequence((5, 6)), [0.0, 1.0])), (0, 0)
    )
    found = throughput.row([row], 0.5, found=0.25, world=world)
    flops = 2 * (3 * (6e9 + 13e8 + 3e7) + 0.75 * (16e6 + 256e5 + 4e4))
    assert found == pytest.approx({
        "speed/tokens_per_second_per_gpu": 12.0,
        "speed/model_tflops_per_gpu": flops / 0.5 / 1e12,
        "speed/mfu": flops / 0.5 / 1e12 / 0.1,
    })  # fmt: skip


@pytest.mark.parametrize(("dtype", "peak"), [(torch.bfloat16, 989.4), (torch.float32, None)])
def test_the_peak_is_that_of_the_device_and_the_format(
    dtype: torch.dtype, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert peak_here(dtype) == peak
