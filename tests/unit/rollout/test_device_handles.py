"""Weights as handles of GPU memory. Blind to CUDA: the memory is the CPU's, and handles are names of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing import reductions

from prism_megatron.rollout import device_handles
from tests.unit.rollout.fake_gpu import UUID, FakeGPU, fake_gpu, reduced
from tests.unit.rollout.fake_sglang import FakeSGLang
from tests.unit.rollout.weight_servers import BY_TENSOR, Attach, announced, assert_holds


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGPU:
    return fake_gpu(monkeypatch)


def test_every_worker_of_every_server_opens_a_handle_of_its_own(
    gpu: FakeGPU, attach: Attach, fakes: list[FakeSGLang]
) -> None:
    """Claim: servers of two workers each hold what was handed over; a handle is opened once and none is left over."""
    for fake in fakes:
        fake.tp_size = 2
    engine = attach(transport="ipc", bucket_bytes=2**19)
    for version, factor in ((1, 1.5), (2, 0.5)):
        engine.update_weights(announced(factor), version)
        for fake in fakes:
            assert_holds(fake, factor, version)
    num_calls = sum(fake.paths().count(BY_TENSOR) for fake in fakes)
    assert len(gpu.opened) == len(gpu.memory) == 2 * num_calls and num_calls > 8
    assert all(len(body["serialized_named_tensors"][0]) < 20_000 for path, body in fakes[0].calls if path == BY_TENSOR)


def test_a_device_is_named_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: as SGLang's own patch of torch does, at the same place among the arguments: its numbers are its own."""
    monkeypatch.setattr(reductions, "reduce_tensor", reduced)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"{UUID} {device}"))
    tensor = torch.arange(6)
    rebuild, arguments = device_handles.shared(tensor)
    plain, numbers = reduced(tensor)
    assert rebuild is plain and arguments[6] == f"{UUID} 3"
    assert (*arguments[:6], 3, *arguments[7:]) == numbers
