"""What an export stores (blind spot: Megatron's side of it, which ``tests/distributed`` has)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.engine.runtime import World
from prism_megatron.training.roles import export_folder

LIKE = MINI_FOLDER / "policy"


class Exporting:
    """An engine that computes in float64 and holds the mini's weights."""

    dtype = torch.float64

    def export_hf(self) -> Iterator[tuple[str, Tensor]]:
        weights = HFFolder(LIKE)
        yield from ((name, weights.get(name).double()) for name in weights.names())


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_an_export_is_stored_as_it_is_asked_for(wanted: torch.dtype, world: World, tmp_path: Path) -> None:
    """Claim: in ``dtype``, while the config goes on saying what to compute in: what the folder's own said."""
    engine: Any = Exporting()
    export_folder(engine, tmp_path / "out", like=LIKE, world=world, dtype=wanted)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {wanted}
    said = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", LIKE)]
    assert said[0] == said[1]
