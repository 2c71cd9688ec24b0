"""The layout of a folder's experts is told from its names and shapes; what cannot be told is refused.

The oracle builds each layout's tensors by hand from one set of experts. Blind spot: a model with a tensor whose shape
is the same in both fused layouts, stored in the other order than its neighbours.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model_providers.qwen3_vl.mapping import expert_mappings, router_mapping
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.experts import ExpertSizes
from prism_megatron.config.presets import preset
from prism_megatron.conversion.expert_layout import ExpertLayout, detect_expert_layout, per_expert_shapes
from prism_megatron.conversion.expert_relayout import relaid
from prism_megatron.conversion.hf.reader import SINGLE, HFFolder
from prism_megatron.errors import ConversionError
from tests.unit.conversion.held import Held

LAYER = "model.language_model.layers.0.mlp"
UP, DOWN = f"{LAYER}.experts.gate_up_proj", f"{LAYER}.experts.down_proj"
LAYOUTS: tuple[ExpertLayout, ...] = ("transformers", "hub", "per_expert")
EXPERTS = 2


def shape(*, hidden: int = 8, width: int = 3) -> Qwen3VLShape:
    base = preset("30B-A3B")
    text = dataclasses.replace(base.text, num_layers=1, hidden=hidden, num_experts=EXPERTS, expert_ffn=width)
    return dataclasses.replace(base, text=text)


def tensors(layout: ExpertLayout, *, hidden: int = 8, width: int = 3) -> dict[str, Tensor]:
    """The same numbers whatever the layout."""
    torch.manual_seed(0)
    gate, up = torch.randn(2, EXPERTS, width, hidden)
    down = torch.randn(EXPERTS, hidden, width)
    held = {f"{LAYER}.gate.weight": torch.randn(EXPERTS, hidden)}
    if layout == "per_expert":
        for expert in range(EXPERTS):
            for part, of in (("gate", gate), ("up", up), ("down", down)):
                held[f"{LAYER}.experts.{expert}.{part}_proj.weight"] = of[expert].contiguous()
        return held
    fused = {UP: torch.cat([gate, up], dim=1), DOWN: down}
    return held | (fused if layout == "transformers" else {n: t.transpose(1, 2).contiguous() for n, t in fused.items()})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_parameters(layout: ExpertLayout) -> None:
    """Claim: a layout is told from the folder, its mapping reads fused tensors by slices only, and what it makes of
    them is bit for bit what the mapping of transformers' layout makes; the mapping read backwards gives the folder."""
    stored = Held(tensors(layout))
    assert detect_expert_layout(stored, shape()) == layout
    sizes = ExpertSizes(EXPERTS, per_token=1, width=3)
    expected = {
        mapping.parameter: mapping.op.split(mapping.read(Held(tensors("transformers"))), 1)[0]
        for mapping in expert_mappings(8, sizes, 0, "transformers")
    }
    found: dict[str, Tensor] = {}
    for mapping in expert_mappings(8, sizes, 0, layout):
        (found[mapping.parameter],) = mapping.op.split(mapping.read(stored), 1)
        merged = mapping.op.merge([found[mapping.parameter]])
        for name, held_shape, tensor in zip(mapping.hf_names, mapping.hf_shapes or (), merged, strict=True):
            held = stored.tensors[name]
            assert held_shape == tuple(held.shape)
            assert torch.equal(tensor, held if mapping.expert is None else held[mapping.expert])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (stored.read_whole == []) == (layout != "per_expert")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wanted", LAYOUTS)
def test_any_layout_becomes_any_other(layout: ExpertLayout, wanted: ExpertLayout) -> None:
    """Claim: every tensor comes once, bit for bit as the other layout has it, in whatever order experts come; fused
    ones are read by slices only."""
    stored = Held(tensors(layout))
    sizes = ExpertSizes(EXPERTS, per_token=1, width=3)
    held, others = ([router_mapping(8, EXPERTS, 0), *expert_mappings(8, sizes, 0, one)] for one in (layout, wanted))
    found = list(relaid(stored, held[::-1], others))
    expected = tensors(wanted)
    assert sorted(name for name, _ in found) == sorted(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found)
    assert not any(name.endswith(("gate_up_proj", "down_proj")) for name in stored.read_whole)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_of_single_experts_are_known_in_every_layout(layout: ExpertLayout) -> None:
    """No tensor is read: a fused one says how many experts there are, and the config how each is cut."""
    expected = {name: tuple(tensor.shape) for name, tensor in tensors("per_expert").items()}
    assert per_expert_shapes(Held(tensors(layout)), shape()) == expected


def test_mixtures_name_two_offenders() -> None:
    of = {layout: tensors(layout) for layout in LAYOUTS}
    single = f"{LAYER}.experts.1.up_proj.weight"
    for mixed, offenders in (
        (of["transformers"] | {DOWN: of["hub"][DOWN]}, (DOWN, UP)),
        (of["hub"] | {DOWN: of["transformers"][DOWN]}, (DOWN, UP)),
        (of["hub"] | {single: of["per_expert"][single]}, (single, DOWN)),
    ):
        with pytest.raises(ConversionError, match=r"stored in two layouts.*save the model again") as refused:
            detect_expert_layout(Held(mixed), shape())
        assert all(repr(name) in str(refused.value) for name in offenders)


@pytest.mark.parametrize(("hidden", "width", "ambiguous"), [(6, 3, UP), (3, 3, DOWN)])
def test_a_shape_that_tells_nothing_is_told_by_the_other_tensor(hidden: int, width: int, ambiguous: str) -> None:
    """Claim: where one fused tensor is square the other decides; where there is no other, the error says why."""
    sizes = shape(hidden=hidden, width=width)
    for layout in LAYOUTS:
        held = tensors(layout, hidden=hidden, width=width)
        assert detect_expert_layout(Held(held), sizes) == layout
    alone = {ambiguous: tensors("hub", hidden=hidden, width=width)[ambiguous]}
    with pytest.raises(ConversionError, match=f"'{ambiguous}' is .* in both known layouts.*no other tensor tells"):
        detect_expert_layout(Held(alone), sizes)


def test_what_fits_no_layout_is_left_to_the_check_of_names() -> None:
    dense = dataclasses.replace(shape(), text=dataclasses.replace(shape().text, num_experts=0))
    assert detect_expert_layout(Held(tensors("hub")), dense) is None
    assert detect_expert_layout(Held({UP: torch.zeros(3, 5, 7)}), shape()) is None


def test_a_folder_reads_one_slice(tmp_path: Path) -> None:
    held = tensors("hub")
    save_file(held, tmp_path / SINGLE)
    folder = HFFolder(tmp_path)
    assert torch.equal(folder.get_slice(DOWN, 1), held[DOWN][1])
    with pytest.raises(ConversionError, match="holds no tensor 'nope'"):
        folder.get_slice("nope", 0)
