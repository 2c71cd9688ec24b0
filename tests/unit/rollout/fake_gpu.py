"""GPU memory that is none: handles of tensors on the CPU, in the form that torch gives those of CUDA tensors."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import reductions

from prism_megatron.rollout import device_handles
from prism_megatron.rollout.weight_buckets import Piece, flat

UUID = "a-gpu-of-this-host"


@dataclass
class FakeGPU:
    """What is shared by handle. Each may be opened once, as torch's count of openers has it."""

    memory: dict[bytes, Tensor] = field(default_factory=dict)
    opened: list[bytes] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def share(self, tensor: Tensor) -> tuple[Any, tuple[Any, ...]]:
        """As ``reduce_tensor`` of a CUDA tensor, but with the device's UUID."""
        handle = f"handle {next(self._numbers)}".encode()
        self.memory[handle] = tensor
        storage = type(tensor._typed_storage())
        arguments = (type(tensor), tensor.size(), tensor.stride(), tensor.storage_offset(), storage, tensor.dtype, UUID,
                     handle, tensor.untyped_storage().nbytes(), 0, False, b"counter", 0, b"event", True)  # fmt: skip
        return reductions.rebuild_cuda_tensor, arguments

    def open(self, *arguments: Any) -> Tensor:
        """As ``rebuild_cuda_tensor``."""
        device, handle = arguments[6:8]
        assert device == UUID
        assert handle not in self.opened, "two workers opened one handle, and torch would give the memory up too early"
        self.opened.append(handle)
        return self.memory[handle]


def on_cpu(piece: Piece) -> Tensor:
    return flat(piece)


def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    """Replaces torch's two ends of a handle in this process."""
    gpu = FakeGPU()

    def rebuild_cuda_tensor(*arguments: Any) -> Tensor:
        return gpu.open(*arguments)

    rebuild_cuda_tensor.__module__, rebuild_cuda_tensor.__qualname__ = reductions.__name__, "rebuild_cuda_tensor"
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", rebuild_cuda_tensor)
    monkeypatch.setattr(device_handles, "on_device", on_cpu)
    monkeypatch.setattr(device_handles, "shared", gpu.share)
    return gpu


def reduced(tensor: Tensor, *, device: int = 3) -> tuple[Any, tuple[Any, ...]]:
    """What torch's ``reduce_tensor`` gives for a tensor on a device of that number, as far as its form goes."""
    rebuild, arguments = FakeGPU().share(torch.as_tensor(tensor))
    return rebuild, (*arguments[:6], device, *arguments[7:])
