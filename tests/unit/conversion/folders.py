"""A small model folder to damage, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from prism_megatron.conversion.hf_writer import write_hf_folder


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
