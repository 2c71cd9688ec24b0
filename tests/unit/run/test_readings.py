"""What rows say of the machines: units, nulls, and that a peak is that since the last row."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from prism_megatron.run import readings as module
from prism_megatron.run.readings import GIB, memory_gib, readings

HERE = timezone(timedelta(hours=9))


def test_a_row_has_its_time_in_utc_and_its_memory_in_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    world: Any = SimpleNamespace(world_size=1, device=torch.device("cpu"))
    holds = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=3 * GIB // 2))
    monkeypatch.setattr(psutil, "Process", lambda: holds)
    now = datetime(2026, 11, 29, 7, 58, 29, 999999, tzinfo=HERE)
    assert readings(world, now=lambda: now) == {
        "time": "2026-11-28T22:58:29Z",
        "memory/host_gib": 1.5,
        "memory/gpu_gib": None,
    }


def test_of_several_ranks_the_largest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gather itself is that of ``parallel.collectives``, which has tests on ranks."""
    world: Any = SimpleNamespace(world_size=4, device=torch.device("cpu"))
    asked: list[dict[str, float]] = []

    def largest(numbers: dict[str, float], *, device: torch.device) -> dict[str, float]:
        asked.append({"device is cpu": float(device.type == "cpu"), **numbers})
        return {"host": 7.0}

    monkeypatch.setattr(module, "max_numbers", largest)
    assert readings(world, now=lambda: datetime.now(UTC))["memory/host_gib"] == 7.0
    assert len(asked) == 1
    assert 0.0 < asked[0]["host"] < 1000.0


def test_a_gpus_peak_begins_anew_with_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blind spot: CUDA's own counting."""
    peaks = [4 * GIB]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: peaks[-1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: peaks.append(GIB))
    device = torch.device("cuda", 0)
    assert [memory_gib(device)["gpu"], memory_gib(device)["gpu"]] == [4.0, 1.0]
