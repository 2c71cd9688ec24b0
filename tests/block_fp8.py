"""Model folders whose language layers are stored in block-wise FP8."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prism_megatron.conversion.hf.block_fp8 import CONFIG_KEY, SCALE_SUFFIX, BlockSize
from prism_megatron.conversion.hf.reader import SINGLE

_BLOCK = BlockSize(16, 24)
_QUANTISED = ("_proj.weight", "_proj")
_SETTINGS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [_BLOCK.rows, _BLOCK.columns],
}


def write_block_fp8(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Weights and config; the linears of the language layers lose their scale and get a random one for each block."""
    held = dict(tensors)
    for name in [name for name in held if "language_model.layers" in name and name.endswith(_QUANTISED)]:
        held[name + SCALE_SUFFIX] = torch.rand(_BLOCK.grid(tuple(held[name].shape))) + 0.1
        held[name] = held[name].to(torch.float8_e4m3fn)
    save_file(held, folder / SINGLE)
    (folder / "config.json").write_text(json.dumps({**config, CONFIG_KEY: _SETTINGS}))
