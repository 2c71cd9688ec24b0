"""What a check runs on: a world of one process, its device, and that device's clock and account of memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.host.capabilities import Installed, installed
from prism_megatron.engine.runtime import World, start, stop

_WARM_UP, _TURNS = 3, 10


@dataclass(frozen=True, eq=False)
class Bench:
    """``dry`` is the CPU in place of the device, with small sizes."""

    world: World
    dry: bool
    machine: Installed

    @property
    def device(self) -> torch.device:
        return self.world.device

    def size(self, real: int, dry: int) -> int:
        """A size that is worth measuring on the device, and one that a CPU is through with at once."""
        return dry if self.dry else real

    def seconds(self, work: Callable[[], object]) -> float:
        """The median of ten runs after three to warm up, by the device's clock; of one run after one on the CPU."""
        for _ in range(1 if self.dry else _WARM_UP):
            work()
        return statistics.median(self._once(work) for _ in range(1 if self.dry else _TURNS))

    def _once(self, work: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        torch.cuda.synchronize()
        milliseconds: float = first.elapsed_time(last)
        return milliseconds / 1e3

    def peak_bytes(self, work: Callable[[], object]) -> int | None:
        """By how much tensors of the device grew at most while ``work`` ran once; None on the CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@contextmanager
def bench(*, dry: bool) -> Iterator[Bench]:
    """A world of this process alone: on its CUDA device, or on the CPU where torch sees none."""
    world = start(ParallelConfig(), seed=1)
    try:
        yield Bench(world, dry, installed())
    finally:
        stop(world)
