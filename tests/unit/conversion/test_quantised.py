"""Claim: a quantised folder is read as codes times scale, and one that is not what its config claims is refused.

Oracle: the multiplication, written out. Blind spot: ModelOpt's own folders (``tests/parity/test_quantise.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from prism_megatron.conversion.hf.quantised import DequantisedFolder
from prism_megatron.errors import ConversionError

CONFIG = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "model.visual*"]}


def tensors() -> dict[str, Tensor]:
    return {
        "model.layers.0.q.weight": torch.tensor([[448.0, -0.5], [0.001953125, 3.5]]).to(torch.float8_e4m3fn),
        "model.layers.0.q.weight_scale": torch.tensor(0.3),
        "model.layers.0.q.input_scale": torch.tensor(7.0),
        "model.layers.0.norm.weight": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        "model.visual.fc.weight": torch.randn(2, 3, dtype=torch.bfloat16),
        "lm_head.weight": torch.randn(4, 2, dtype=torch.bfloat16),
    }


def write(folder: Path, held: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Path:
    save_file(dict(held), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({} if config is None else {"quantization_config": config}))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_codes_times_scale(tmp_path: Path, dtype: torch.dtype) -> None:
    """Claim: exact; the rest is as stored, and scales are no weights."""
    held = tensors()
    source = DequantisedFolder(write(tmp_path, held, CONFIG), dtype=dtype)
    expected = (torch.tensor([[448.0, -0.5], [0.001953125, 3.5]]) * torch.tensor(0.3)).to(dtype)
    assert torch.equal(source.get("model.layers.0.q.weight"), expected)
    assert torch.equal(source.get_slice("model.layers.0.q.weight", 1), expected[1])
    assert torch.equal(source.get_rows("model.layers.0.q.weight", 1, 2), expected[1:])
    assert source.quantised == {"model.layers.0.q.weight"}
    plain = {"lm_head.weight", "model.layers.0.norm.weight", "model.visual.fc.weight"}
    assert set(source.names()) == source.shapes().keys() == source.quantised | plain
    for name, stored in source.dtypes().items():
        assert source.get(name).dtype == stored
    for name in plain:
        assert source.get(name).dtype == held[name].dtype
        assert torch.equal(source.get(name), held[name])


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({}, None, "quant_method 'modelopt' expected"),
        ({}, CONFIG | {"quant_method": "fp8"}, "quant_method 'modelopt' expected"),
        ({}, CONFIG | {"quant_algo": "NVFP4"}, "'NVFP4' is not read back"),
        ({}, CONFIG | {"ignore": "lm_head"}, "ignore, a list of texts"),
        ({}, CONFIG | {"ignore": ["lm_head"]}, "calls 'model.visual.fc.weight' quantised, but it has no float8 codes"),
        ({}, CONFIG | {"ignore": ["*"]}, "'model.layers.0.q.weight' has float8 codes, but config.json does not cover"),
        ({"model.layers.0.q.weight_scale": None}, CONFIG, "has no weight_scale"),
        ({"model.layers.0.q.input_scale": None}, CONFIG, "has no input_scale"),
        ({"lm_head.weight_scale": torch.tensor(1.0)}, CONFIG, "'lm_head.weight' has weight_scale, but"),
        ({"model.layers.0.q.weight_scale": torch.tensor(0.0)}, CONFIG, "one positive weight_scale"),
        ({"model.layers.0.q.weight_scale": torch.tensor(torch.nan)}, CONFIG, "one positive weight_scale"),
        ({"model.layers.0.q.weight_scale": torch.ones(2)}, CONFIG, "one positive weight_scale"),
    ],
)
def test_refused(tmp_path: Path, change: dict[str, Tensor | None], config: dict[str, Any] | None, message: str) -> None:
    """Claim: refused on opening, with the tensor or the field named."""
    held = {name: tensor for name, tensor in (tensors() | change).items() if tensor is not None}
    with pytest.raises(ConversionError, match=message.replace(".", r"\.").replace("*", r"\*")):
        DequantisedFolder(write(tmp_path, held, config), dtype=torch.float32)
