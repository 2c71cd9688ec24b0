"""A preset written as a ``config.json`` is read back as the same shape."""

from __future__ import annotations

import json

import pytest

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.presets import PRESETS, hf_config, preset
from tests.unit.config.test_qwen3_vl import HUB


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_returns_from_its_config(name: str) -> None:
    """Claim: every size survives JSON. Blind spot: keys that only transformers reads."""
    written = json.loads(json.dumps(hf_config(preset(name))))
    assert Qwen3VLShape.from_dict(written) == preset(name)


def test_the_2b_is_the_published_one() -> None:
    assert preset("2B") == Qwen3VLShape.from_dict(HUB)


def test_what_sizes_share_and_what_they_do_not() -> None:
    """By hand from the published files, so that it needs none of them: who ties, key/value heads, taps, experts."""
    shapes = {name: preset(name) for name in PRESETS}
    assert {name for name, shape in shapes.items() if shape.text.tied} == {"2B", "4B"}
    assert {name: shape.text.kv_heads for name, shape in shapes.items()} == dict.fromkeys(PRESETS, 8) | dict.fromkeys(
        ("30B-A3B", "235B-A22B"), 4
    )
    small, large = {"2B", "4B"}, set(PRESETS) - {"2B", "4B"}
    for names, depth, taps in ((small, 24, (5, 11, 17)), (large, 27, (8, 16, 24))):
        assert {(shapes[name].vision.depth, shapes[name].vision.taps) for name in names} == {(depth, taps)}
    assert {name: shape.text.expert_ffn for name, shape in shapes.items() if shape.text.experts} == {
        "30B-A3B": 768,
        "235B-A22B": 1536,
    }
