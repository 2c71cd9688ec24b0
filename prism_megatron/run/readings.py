"""What a row says of the machines: when it was written, and how much memory the ranks hold."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import psutil
import torch

from prism_megatron.engine.runtime import World
from prism_megatron.observability.metrics import Value
from prism_megatron.parallel.collectives import max_numbers
from prism_megatron.run.reporting import utc_text

GIB = 2**30


def readings(world: World, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> dict[str, Value]:
    """``time``, ``memory/host_gib`` and ``memory/gpu_gib`` of a step; the largest of all ranks, which call it together.

    The GPU's figure is the most that was allocated since the last call; it is null without CUDA.
    """
    held = memory_gib(world.device)
    if world.world_size > 1:
        held = max_numbers(held, device=world.device)
    return {"time": utc_text(now()), "memory/host_gib": held["host"], "memory/gpu_gib": held.get("gpu")}


def memory_gib(device: torch.device) -> dict[str, float]:
    """This rank's resident set, and with CUDA the largest sum of its tensors since the last call."""
    held = {"host": psutil.Process().memory_info().rss / GIB}
    if device.type == "cuda":
        held["gpu"] = torch.cuda.max_memory_allocated(device) / GIB
        torch.cuda.reset_peak_memory_stats(device)
    return held
