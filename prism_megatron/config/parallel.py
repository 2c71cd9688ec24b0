"""How a model is split over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel axes; data parallelism takes the ranks that are left."""

    tp: int = 1
    """tensor-parallel size"""
    pp: int = 1
    """pipeline-parallel size"""
    vpp: int = 1
    """virtual pipeline stages (model chunks) per rank"""
    ep: int = 1
    """expert-parallel size of models with experts"""
    sp: Literal["auto", "on", "off"] = "auto"
    """sequence parallelism; auto turns it on for a model with experts at tp > 1, which Megatron requires"""
    distributed_optimizer: bool = True
    """shard optimizer state over data-parallel ranks"""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of a dense model."""
        return self.tp * self.pp

    def sequence_parallel(self, *, experts: bool) -> bool:
        """Whether a model runs with sequence parallelism; ``experts`` says whether it has expert layers."""
        if self.tp == 1:
            return False
        return self.sp == "on" or (self.sp == "auto" and experts)
