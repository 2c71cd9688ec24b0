"""Quantising a Hugging Face folder that ``prism-convert to-hf`` writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from prism_megatron.config.fields import AT_LEAST_ONE, check_fields
from prism_megatron.errors import ConfigError

Recipe = Literal["fp8", "nvfp4"]


@dataclass(frozen=True)
class QuantConfig:
    """What becomes of the language model's linears; everything else keeps the numbers it has."""

    quant: Recipe | None = None
    """fp8: float8 weights and inputs, one scale each per linear; nvfp4: four bits in blocks of 16, on a CUDA device
    only. Needs the extra `quant`"""
    calibrate: Path | None = None
    """folder of records (as --data of training) that the range of every linear's input is measured on; the mini does
    without, on its own scenes"""
    calibration_records: Annotated[int, AT_LEAST_ONE] = 64
    """records to measure on, each a question with its image and its reference answer"""


def check_quant(config: QuantConfig) -> None:
    """Raise ConfigError, naming the flag, for what cannot work whatever the model is."""
    check_fields(config)
    if config.quant is None:
        if config.calibrate is not None:
            raise ConfigError(f"--calibrate {config.calibrate} does nothing without --quant; add --quant fp8")
        return
    if config.calibrate is not None and not (config.calibrate / "data.jsonl").is_file():
        raise ConfigError(f"--calibrate {config.calibrate} holds no data.jsonl; name a folder of records")
