"""What a process of a world imports before it begins, where there is no GPU."""

from __future__ import annotations

import subprocess
import sys

_CODE = """
import importlib, sys
from prism_megatron.engine.launch import PRELOAD
for name in PRELOAD:
    importlib.import_module(name)
print("torch._inductor.compile_fx" in sys.modules)
import torch
print(torch.compile.__module__)
from megatron.core.fusions.fused_bias_dropout import bias_dropout_add_fused_train
print(bias_dropout_add_fused_train.__module__)
"""


def test_torchs_compiler_is_not_loaded_and_can_be_used_afterwards() -> None:
    """Claim: importing what ranks use, Megatron included, loads no compiler and leaves ``torch.compile`` as it was.

    Blind spot: what the first step imports.
    """
    words = [sys.executable, "-c", _CODE]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300).stdout
    assert said.split() == ["False", "torch", "megatron.core.fusions.fused_bias_dropout"]
