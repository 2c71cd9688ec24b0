"""The one way to open a Hugging Face folder as a model to load, whatever its weights are stored in."""

from __future__ import annotations

from pathlib import Path

import torch

from prism_megatron.conversion.hf.block_fp8 import CONFIG_KEY, DequantisedSource, quantised_blocks
from prism_megatron.conversion.hf.files import member, read_object
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.errors import ConversionError

_UNQUANTISED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MODELOPT_CONFIG = "hf_quant_config.json"


def open_weights(folder: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> TensorSource:
    """The weights of a folder, under the names of the model that is not quantised.

    Those stored in block-wise FP8 come out in ``dtype`` (``conversion.block_fp8``), all others as they are stored.
    Raises ConversionError for a damaged folder, and for weights in any other quantisation.
    """
    source = HFFolder(folder)
    path = source.folder / "config.json"
    try:
        config = read_object(member(source.folder, path.name))
    except FileNotFoundError as error:
        raise ConversionError(f"{path} does not exist; give a Hugging Face model folder") from error
    block = quantised_blocks(config, str(path))
    if block is None and (source.folder / _MODELOPT_CONFIG).exists():
        raise ConversionError(
            f"{source.folder / _MODELOPT_CONFIG} says that the weights are quantised by modelopt, which is not read; "
            "give the model that it was made from"
        )
    opened = source if block is None else DequantisedSource(source, block, dtype)
    for name, stored in opened.dtypes().items():
        if stored not in _UNQUANTISED:
            raise ConversionError(
                f"{source.folder}: {name!r} is stored in {str(stored).removeprefix('torch.')}, which "
                + (f"config.json has no {CONFIG_KEY} for" if block is None else "block-wise FP8 does not use")
                + "; give the model as it was before it was quantised"
            )
    return opened
