"""Handles of GPU memory as SGLang's own code reads them: its restricted unpickler, its UUIDs, its buckets.

Blind to CUDA. The two ends of a handle, which torch has for CUDA tensors alone, are replaced on both sides: here by
arguments of the same types whose handle is the path of a file, there by a function that maps the file.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prism_megatron.rollout import device_handles
from prism_megatron.rollout.sglang.arguments import PYTHON, server_environment
from prism_megatron.rollout.weight_buckets import Piece, flat
from tests.sglang.conftest import REPOSITORY
from tests.unit.rollout.fake_gpu import UUID, FakeGPU, on_cpu

READER = """
import sys
from types import SimpleNamespace
import torch
from torch.multiprocessing import reductions
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket, FlattenedTensorMetadata

payload, uuid, out = open(sys.argv[1]).read(), sys.argv[2], sys.argv[3]
monkey_patch_torch_reductions()
torch.cuda.device_count = lambda: 3
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=uuid if device == 2 else "another")

def mapped(cls, size, stride, offset, storage, dtype, device, handle, num_bytes, *rest):
    assert device == 2, device
    assert (cls, dtype, offset, size) == (torch.Tensor, torch.uint8, 0, torch.Size([num_bytes]))
    return torch.from_file(handle.decode(), dtype=torch.uint8, size=num_bytes)

reductions._rebuild_cuda_tensor_original = mapped
bucket = MultiprocessingSerializer.deserialize(payload)
fields = "name shape dtype start_idx end_idx numel".split()
metadata = [FlattenedTensorMetadata(**{key: getattr(one, key) for key in fields}) for one in bucket["metadata"]]
flat = bucket["flattened_tensor"]
tensors = FlattenedTensorBucket(flattened_tensor=flat, metadata=metadata).reconstruct_tensors()
torch.save({name: tensor.clone() for name, tensor in tensors}, out)
"""


def test_sglang_reads_our_handles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: its unpickler lets every name in them pass, finds the device by its UUID and takes the bytes apart."""
    tensors = (
        ("a.weight", torch.arange(12, dtype=torch.float32).reshape(3, 4)),
        ("b.weight", torch.tensor([1.5, -2.25], dtype=torch.bfloat16)),
    )
    piece, gpu, memory = Piece(tensors, is_last=True), FakeGPU(), tmp_path / "memory"
    memory.write_bytes(flat(piece).numpy().tobytes())

    def share(tensor: Tensor) -> tuple[Any, tuple[Any, ...]]:
        rebuild, arguments = gpu.share(tensor)
        return rebuild, (*arguments[:7], str(memory).encode(), *arguments[8:])

    monkeypatch.setattr(device_handles, "on_device", on_cpu)
    monkeypatch.setattr(device_handles, "shared", share)
    body = device_handles.Handles(piece).body({"flush_cache": False}, num_workers=2)
    assert body["load_format"] == "flattened_bucket" and len(body["serialized_named_tensors"]) == 2
    for number, payload in enumerate(body["serialized_named_tensors"]):
        (tmp_path / "payload").write_text(payload)
        out = tmp_path / f"out-{number}"
        command = [str(REPOSITORY / PYTHON), "-c", READER, str(tmp_path / "payload"), UUID, str(out)]
        environment = server_environment(os.environ, tp=1, cuda=False)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        read = torch.load(out, weights_only=True)
        assert read.keys() == dict(tensors).keys()
        assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors)
