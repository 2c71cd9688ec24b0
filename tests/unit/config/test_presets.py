"""A preset written as a ``config.json`` is read back as the same shape."""

from __future__ import annotations

import json

import pytest

from prism_megatron.config.presets import PRESETS, hf_config, preset
from prism_megatron.config.qwen3_vl import Qwen3VLShape


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_returns_from_its_config(name: str) -> None:
    """Claim: every size survives JSON. Blind spot: keys that only transformers reads."""
    written = json.loads(json.dumps(hf_config(preset(name))))
    assert Qwen3VLShape.from_dict(written) == preset(name)
