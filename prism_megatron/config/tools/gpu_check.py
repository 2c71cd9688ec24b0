"""The configuration of ``make gpu-check``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from prism_megatron.config.fields import Range, check_fields
from prism_megatron.errors import ConfigError

Check = Literal["parity", "attention", "layer", "experts", "head", "memory", "align"]
CHECKS: tuple[Check, ...] = get_args(Check)


@dataclass(frozen=True)
class GpuCheckConfig:
    """Does what runs on the CPU run on this GPU, with the same numbers, and how fast (docs/gpu.md)?"""

    only: tuple[Check, ...] = CHECKS
    """checks that are made, each in a process of its own"""
    dry: bool = False
    """make them on the CPU instead, with small sizes: everything but the device is tried"""
    minutes: Annotated[float, Range(above=0)] = 8.0
    """for all checks together; one that is not over by then is ended, and those after it are skipped by name"""
    output: Path = Path("runs/gpu_check")
    """folder for gpu_check.json and table.txt, which are written anew after every check, and the checks' own output"""


def check_gpu_check(config: GpuCheckConfig, *, has_cuda: bool) -> None:
    """Raise ConfigError for what cannot work."""
    check_fields(config)
    if not config.only:
        raise ConfigError(f"--only names no check; name some of {', '.join(CHECKS)}, or leave it out")
    if not (has_cuda or config.dry):
        raise ConfigError("there is no CUDA device that torch can use; try everything but the device with --dry")
    if config.output.exists() and not config.output.is_dir():
        raise ConfigError(f"--output {config.output} is a file; name a folder")
