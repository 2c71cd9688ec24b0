"""Claim: the six published models build at TP8·PP4, and hold as many weights as were published.

Oracle: the totals below, those of the same configs built with transformers 5.23 (a tied output layer counted once);
where the shared folder is, they are held against its record. Blind spot: shapes and names only; nothing is computed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.presets import PRESETS, preset
from prism_megatron.errors import ConfigError

TOTALS = {
    "2B": 2_127_532_032,
    "4B": 4_437_815_808,
    "8B": 8_767_123_696,
    "32B": 33_357_390_064,
    "30B-A3B": 31_070_754_032,
    "235B-A22B": 235_670_022_896,
}
REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_preset_builds_and_has_the_published_number_of_weights() -> None:
    """In a process of its own: the simulated world of 32 ranks replaces any other."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.parity.preset_counts", *PRESETS],
        cwd=REPOSITORY,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert json.loads(found.stdout.splitlines()[-1]) == TOTALS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_configs(name: str, shared_dir: Path) -> None:
    config = json.loads((shared_dir / "qwen3_vl" / "configs" / f"{name}.json").read_text())
    counts = json.loads((shared_dir / "qwen3_vl" / "param_counts.json").read_text())
    assert preset(name) == Qwen3VLShape.from_dict(config)
    assert counts[name]["total"] == TOTALS[name]


def test_an_unknown_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no Qwen3-VL '7B'; choose one of 2B, 4B"):
        preset("7B")
