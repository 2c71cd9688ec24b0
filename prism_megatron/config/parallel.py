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
    cp: int = 1
    """context-parallel size: ranks that share each sequence"""
    ep: int = 1
    """expert-parallel size of models with experts"""
    etp: int | None = None
    """tensor-parallel size of experts; by default tp at --ep 1, else 1"""
    sp: Literal["auto", "on", "off"] = "auto"
    """sequence parallelism; auto turns it on for a model with experts at tp > 1, which Megatron requires"""
    cp_comm: Literal["all_gather", "a2a"] = "all_gather"
    """what context parallelism sends for attention: all keys and values, or heads for tokens (Ulysses)"""
    first_stage_layers: int | None = None
    """language layers of the first pipeline stage, where they do not divide evenly"""
    last_stage_layers: int | None = None
    """language layers of the last pipeline stage, where they do not divide evenly"""
    distributed_optimizer: bool = True
    """shard optimizer state over data-parallel ranks"""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of a dense model and share its sequences."""
        return self.tp * self.cp * self.pp

    @property
    def expert_tp(self) -> int:
        """Tensor-parallel size of experts."""
        if self.etp is not None:
            return self.etp
        return self.tp if self.ep == 1 else 1

    @property
    def length_multiple(self) -> int:
        """What sequence lengths are padded to: each context-parallel rank takes two chunks that divide over tp."""
        return self.tp * (2 * self.cp if self.cp > 1 else 1)

    def sequence_parallel(self, *, experts: bool) -> bool:
        """Whether a model runs with sequence parallelism; ``experts`` says whether it has expert layers."""
        if self.tp == 1:
            return False
        return self.sp == "on" or (self.sp == "auto" and experts)
