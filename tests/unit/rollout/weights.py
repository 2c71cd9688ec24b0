"""Weights of the mini's policy, as an export gives them."""

from __future__ import annotations

from collections.abc import Iterator

from safetensors.torch import load_file
from torch import Tensor

from prism_megatron.config.experiments.mini_world import MINI_FOLDER


def mini_weights(factor: float = 1.0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its Hugging Face name, times ``factor``."""
    for name, tensor in load_file(MINI_FOLDER / "policy" / "model.safetensors").items():
        yield name, tensor * factor
