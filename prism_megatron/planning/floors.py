"""The least time that a phase can take on a GPU, and the roof that it hits.

Every roof is a published figure (``gpus.py``) and nothing is added: products at the dense bf16 peak, bytes at the
memory's, what is sent at the links', all at once and each without a pause. Times of real steps are longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prism_megatron.planning.gpus import Gpu
from prism_megatron.planning.links import Traffic

Roof = Literal["compute", "HBM", "NVLink", "network"]


@dataclass(frozen=True)
class Phase:
    """What a part of a step asks of the busiest GPU. ``Phase("update", flops=1e15, hbm=1e12)``."""

    name: str
    flops: float
    """of matrix products, recomputed ones included"""
    hbm: float
    """bytes read and written, the least there are"""
    traffic: Sequence[Traffic] = ()
    waits: float = 1.0
    """products' time over that without the empty beginnings and ends of a pipeline"""

    @property
    def nvlink(self) -> float:
        return sum(one.nvlink for one in self.traffic)

    @property
    def network(self) -> float:
        return sum(one.network for one in self.traffic)

    @property
    def collectives(self) -> float:
        return sum(one.count for one in self.traffic)

    def seconds(self, gpu: Gpu) -> dict[Roof, float]:
        """By roof."""
        return {
            "compute": self.waits * self.flops / (gpu.bf16_tflops * 1e12),
            "HBM": self.hbm / (gpu.hbm_gbs * 1e9),
            "NVLink": self.nvlink / (gpu.nvlink_gbs * 1e9),
            "network": self.network / (gpu.network_gbs * 1e9),
        }

    def floor(self, gpu: Gpu) -> tuple[Roof, float]:
        """The roof that is hit, and the seconds until it is."""
        times = self.seconds(gpu)
        roof = max(times, key=times.__getitem__)
        return roof, times[roof]


def step_floor(phases: Sequence[Phase], gpu: Gpu) -> float:
    """Seconds of a step whose phases follow one another."""
    return sum(phase.floor(gpu)[1] for phase in phases)
