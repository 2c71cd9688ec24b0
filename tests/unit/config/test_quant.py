"""Claim: quantising flags that cannot work are refused before anything is read, and the flag is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism_megatron.config.architecture.quant import QuantConfig, check_quant
from prism_megatron.errors import ConfigError


def test_flags(tmp_path: Path) -> None:
    check_quant(QuantConfig())
    check_quant(QuantConfig(quant="fp8"))
    with pytest.raises(ConfigError, match=r"--calibrate .* without --quant"):
        check_quant(QuantConfig(calibrate=tmp_path))
    with pytest.raises(ConfigError, match="--calibration-records 0"):
        check_quant(QuantConfig(quant="fp8", calibration_records=0))
    with pytest.raises(ConfigError, match=r"--calibrate .* holds no data\.jsonl"):
        check_quant(QuantConfig(quant="fp8", calibrate=tmp_path))
    (tmp_path / "data.jsonl").touch()
    check_quant(QuantConfig(quant="fp8", calibrate=tmp_path))
