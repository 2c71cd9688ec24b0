"""Megatron's ways of taking many optimizer steps faster. None of them changes what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from prism_megatron.config.fields import AT_LEAST_ONE, ZERO_IS_OFF, OnResume
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class SpeedConfig:
    """What runs beside what, and when Python collects its garbage."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FREE

    overlap_grad_reduce: bool = False
    """sum gradients over data-parallel ranks bucket by bucket, while the backward pass goes on"""
    overlap_param_gather: bool = False
    """gather updated weights bucket by bucket, while the next forward pass goes on; needs --overlap-grad-reduce and
    --distributed-optimizer"""
    bucket_parameters: Annotated[int | None, AT_LEAST_ONE] = None
    """weights of such a bucket; by default Megatron's, 40 million or a million a data-parallel rank"""
    fuse_weight_gradients: bool = False
    """add weight gradients to their sum inside the matrix product; needs NVIDIA apex's CUDA extension"""
    manual_gc: Annotated[int, ZERO_IS_OFF] = 0
    """collect garbage every so many steps, on all ranks at once, and never between; 0 leaves it to Python"""


def check_speed(speed: SpeedConfig, *, distributed_optimizer: bool) -> None:
    """Raise ConfigError for flags that do not go together."""
    if speed.overlap_param_gather and not (speed.overlap_grad_reduce and distributed_optimizer):
        raise ConfigError(
            "--overlap-param-gather gathers by the buckets of --overlap-grad-reduce what --distributed-optimizer has "
            "split; add them, or leave it out"
        )
    if speed.bucket_parameters is not None and not speed.overlap_grad_reduce:
        raise ConfigError("--bucket-parameters is for --overlap-grad-reduce; add it, or leave it out")
