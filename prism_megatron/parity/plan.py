"""How much memory a comparison of two whole models takes."""

from __future__ import annotations

from math import prod
from pathlib import Path

from prism_megatron.conversion.hf.open_source import open_weights


def planned_bytes(folder: Path, dtype: str, *, copies: int) -> int:
    """Memory of the whole comparison on one host, activations left out. ConversionError for a damaged folder.

    Ours are built while transformers' float32 gradients are kept: parameters, fp32 gradients and AdamW's moments (and
    fp32 masters beside bf16) for each of ``copies`` data-parallel copies. The moments are then given up, and exported
    gradients, which are smaller, come in their place; the weights' file is mapped all the time.
    """
    elements = sum(prod(shape) for shape in open_weights(folder).shapes().values())
    ours = 4 + 4 + 8 if dtype == "fp32" else 2 + 4 + 8 + 4
    return elements * (4 + copies * ours + 4)
