"""A small model folder to damage, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from prism_megatron.conversion.checkpoints.folder import write_state
from prism_megatron.conversion.checkpoints.torch_dist_writer import WrittenChunk, write_data_file, write_index
from prism_megatron.conversion.hf.writer import write_hf_folder
from prism_megatron.conversion.ops import Box


def companions(folder: Path) -> Path:
    """A folder with two companion files, and one that is none."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "notes.txt").write_text("not a companion")
    return folder


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "a.weight": torch.randn(5, 3),
        "b.weight": torch.randn(4, 4).to(torch.bfloat16),
        "c.bias": torch.randn(7),
        "d.weight": torch.randn(6, 2).t(),
    }


def sharded(folder: Path, like: Path) -> Path:
    write_hf_folder(folder, weights().items(), like=like, max_shard_bytes=70)
    return folder


def checkpoint_of(folder: Path, tensors: Mapping[str, Tensor], engines: Mapping[str, Mapping[str, int]]) -> Path:
    """A checkpoint of these tensors, each in one chunk, without models."""
    folder.mkdir(exist_ok=True)
    lengths = write_data_file(folder / "__0_0.distcp", tensors.values(), lambda _: None)
    chunks = [
        WrittenChunk(key, Box((0,) * tensor.dim(), tuple(tensor.shape)), "__0_0.distcp", sum(lengths[:n]), lengths[n])
        for n, (key, tensor) in enumerate(tensors.items())
    ]
    write_index(folder, {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}, chunks)
    write_state(folder, engines=engines, models={}, state={"step": 11})
    return folder
