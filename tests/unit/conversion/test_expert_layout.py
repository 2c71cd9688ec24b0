"""Folders of either expert layout read alike; what cannot be told apart is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from prism_megatron.conversion.expert_layout import with_experts_as_mapped
from prism_megatron.conversion.hf_reader import SINGLE, HFFolder
from prism_megatron.conversion.mapping import TensorSource, WeightMapping
from prism_megatron.conversion.ops import FusedGateUp, Op, Row
from prism_megatron.errors import ConversionError

UP, DOWN, GATE = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"


def mappings(*, hidden: int = 8, width: int = 3, experts: int = 2) -> list[WeightMapping]:
    fused: tuple[tuple[str, Op, tuple[int, int]], ...] = (
        (UP, FusedGateUp(), (2 * width, hidden)),
        (DOWN, Row(), (hidden, width)),
    )
    return [
        WeightMapping((name,), f"{name}.{expert}", op, hf_shapes=((experts, *matrix),), expert=expert)
        for name, op, matrix in fused
        for expert in range(experts)
    ]


def tensors(*, hidden: int = 8, width: int = 3, experts: int = 2) -> dict[str, Tensor]:
    return {
        UP: torch.randn(experts, 2 * width, hidden),
        DOWN: torch.randn(experts, hidden, width),
        GATE: torch.randn(experts, hidden),
    }


def transposed(held: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {n: t.transpose(1, 2).contiguous() if n in names else t for n, t in held.items()}


class Recorded(TensorSource):
    """Tensors of a dict that remembers what was read whole."""

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        self.held = held
        self.read_whole: list[str] = []

    def names(self) -> Sequence[str]:
        return list(self.held)

    def get(self, name: str) -> Tensor:
        self.read_whole.append(name)
        return self.held[name]

    def get_slice(self, name: str, index: int) -> Tensor:
        return self.held[name][index]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.held.items()}


@pytest.mark.parametrize("stored_transposed", [False, True])
def test_either_layout_reads_as_mapped(stored_transposed: bool) -> None:
    """Claim: shapes, whole tensors and slices are those of the mapped layout, and loading reads slices only."""
    held = tensors()
    stored = Recorded(transposed(held, UP, DOWN) if stored_transposed else held)
    source = with_experts_as_mapped(stored, mappings())
    assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in held.items()}
    assert set(source.names()) == held.keys()
    for mapping in mappings():
        assert mapping.expert is not None
        (part,) = mapping.read(source)
        assert torch.equal(part, held[mapping.hf_names[0]][mapping.expert])
        assert part.is_contiguous()
    assert stored.read_whole == []
    for name, tensor in held.items():
        assert torch.equal(source.get(name), tensor)


def test_mixtures_and_ambiguous_sizes_are_refused() -> None:
    held = tensors()
    for name in (UP, DOWN):
        with pytest.raises(ConversionError, match=r"stored in two layouts.*save the model again"):
            with_experts_as_mapped(Recorded(transposed(held, name)), mappings())
    for hidden, width, name in ((6, 3, UP), (3, 3, DOWN)):
        with pytest.raises(ConversionError, match=f"'{name}' is .* in both known layouts"):
            with_experts_as_mapped(Recorded(tensors(hidden=hidden, width=width)), mappings(hidden=hidden, width=width))


def test_a_folder_reads_one_slice(tmp_path: Path) -> None:
    held = tensors()
    save_file(held, tmp_path / SINGLE)
    folder = HFFolder(tmp_path)
    assert torch.equal(folder.get_slice(DOWN, 1), held[DOWN][1])
    with pytest.raises(ConversionError, match="holds no tensor 'nope'"):
        folder.get_slice("nope", 0)
