"""How often an epoch of fine-tuning shows each source, and what its samples cost."""

from __future__ import annotations

import pytest

from prism_megatron.config.presets import preset
from prism_megatron.config.stages.demonstrations import DemonstrationsConfig
from prism_megatron.observability.model_flops import Arithmetic
from prism_megatron.stages.sft.build import _times, cost_of
from tests.unit.data.stream.test_plan import samples_of_lengths


def test_weights_are_shares_of_an_epoch() -> None:
    """Claim: of 80 and 20 records, weights of 1 and 3 make 25 and 75 of 100; repeats are taken as they are."""
    samples = samples_of_lengths([8] * 100, [0] * 80 + [1] * 20)
    assert _times(DemonstrationsConfig(weights=("a=1", "b=3")), samples) == {"a": 25 / 80, "b": 75 / 20}
    assert _times(DemonstrationsConfig(repeats=("a=0.5",)), samples) == {"a": 0.5}
    assert _times(DemonstrationsConfig(), samples) == {}


def test_a_visual_token_of_a_frozen_tower_weighs_a_third() -> None:
    """Claim: FLOPs of forward and backward, against those of the forward pass alone; a text token always trains."""
    shape = preset("4B")
    arithmetic, merge = Arithmetic.of(shape), shape.vision.merge
    frozen, trained = cost_of(shape, ("vision", "projector")), cost_of(shape, ())
    forward = arithmetic.patch * merge**2 + arithmetic.merged
    assert frozen.visual_token == pytest.approx(2 * forward)
    assert trained.visual_token == pytest.approx(6 * forward)
    assert frozen.token == trained.token == 6 * arithmetic.token
    assert frozen.token_pair == pytest.approx(3 * arithmetic.pair)
