"""A folder in block-wise FP8 becomes a checkpoint, and that a plain folder, without Megatron.

The oracle is the folder as ``open_weights`` presents it, which ``test_block_fp8.py`` holds against block loops. Blind
spot: real sizes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model_providers.qwen3_vl.mapping import weight_mappings
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.tools.convert import ToHFConfig, ToMegatronConfig
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.conversion.hf.block_fp8 import CONFIG_KEY
from prism_megatron.conversion.hf.open_source import open_weights
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.jobs.convert import to_hf, to_megatron
from prism_megatron.parity.tiny import MODELS, tiny_config
from tests.block_fp8 import write_block_fp8


def write_fp8(folder: Path, config: dict[str, Any], layout: ExpertLayout) -> None:
    """A model whose language layers are quantised, of random numbers; its other weights are bf16."""
    held: dict[str, Tensor] = {}
    for mapping in weight_mappings(Qwen3VLShape.from_dict(config), layout):
        for name, shape in zip(mapping.hf_names, mapping.hf_shapes or (), strict=True):
            held[name] = torch.randn(shape).to(torch.bfloat16)
    folder.mkdir()
    write_block_fp8(folder, held, config)


@pytest.mark.parametrize(
    ("model", "layout"),
    [("dense tied", "transformers"), ("MoE", "hub"), ("MoE", "per_expert"), ("MoE", "transformers")],
)
def test_from_fp8_to_a_plain_folder(tmp_path: Path, model: str, layout: ExpertLayout) -> None:
    """Claim: every tensor comes back dequantised bit for bit, under the name it had, with a config that says so."""
    write_fp8(tmp_path / "fp8", tiny_config(**MODELS[model]), layout)
    said: list[str] = []
    to_megatron(
        ToMegatronConfig(hf=str(tmp_path / "fp8"), save=str(tmp_path / "checkpoint"), weights_only=True),
        say=said.append,
    )
    to_hf(ToHFConfig(load=str(tmp_path / "checkpoint"), save=str(tmp_path / "plain")), say=said.append)
    expected, found = open_weights(tmp_path / "fp8"), HFFolder(tmp_path / "plain")
    assert sorted(found.names()) == sorted(expected.names())
    assert set(found.dtypes().values()) == {torch.bfloat16}
    for name in found.names():
        assert torch.equal(found.get(name), expected.get(name)), name
    assert CONFIG_KEY not in json.loads((tmp_path / "plain" / "config.json").read_text())
