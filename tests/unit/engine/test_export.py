"""Which weights an engine names, on one rank (``tests/distributed`` and ``tests/parity`` have what shards make)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prism_megatron.conversion.mapping import WeightMapping
from prism_megatron.conversion.ops import Replicated
from prism_megatron.engine.export import WeightTable
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConversionError
from tests.distributed import tiny
from tests.unit.conversion.held import Held


def test_what_is_announced_is_what_comes(world: World) -> None:
    """Claim: with a frozen vision tower a whole export has every weight, and one of changes has the language's."""
    engine = tiny.build(world, freeze_vision=True)
    everything = tiny.weights(tiny.provider()).shapes()
    for changed_only in (False, True):
        exported = engine.export_hf(changed_only=changed_only)
        expected = {name: shape for name, shape in everything.items() if not (changed_only and ".visual." in name)}
        assert exported.shapes == expected
        assert exported.left_out == everything.keys() - expected.keys()
        assert {name: tuple(tensor.shape) for name, tensor in exported} == expected


def test_replicated_are_the_weights_that_every_rank_holds_whole(world: World) -> None:
    """Claim: norms, biases of row-parallel linears, position and patch embeddings; nothing that is cut."""
    names = {name for name, _ in tiny.build(world, optimizer=None).weights.replicated()}
    assert {"vision_model.patch_embed.weight", "vision_model.patch_embed.bias", "vision_model.pos_embed.weight"} < names
    assert {"decoder.final_layernorm.weight", "vision_model.merger.linear_fc2.bias"} < names
    kinds = {name.rsplit(".", 2)[-2] for name in names}
    assert all(kind.endswith(("layernorm", "norm", "_embed", "linear_proj", "linear_fc2")) for kind in kinds), kinds
    assert not any(name.endswith(("proj.weight", "fc2.weight", "word_embeddings.weight")) for name in names)


def test_a_mapping_that_no_stage_holds_is_refused(world: World) -> None:
    """Claim: as of virtual stages that all take themselves for the first, and hold some layers twice."""
    model = tiny.provider()
    stray = WeightMapping(("a.weight",), "decoder.layers.4.a.weight", Replicated(), hf_shapes=((1,),))
    modules = tiny.build(world, optimizer=None).modules
    with pytest.raises(ConversionError, match=r"that no stage holds: \['decoder.layers.4.a.weight'\]"):
        WeightTable(modules, lambda layout: [*model.weight_mappings(layout), stray], world.groups, num_experts=0)


def test_a_source_with_a_tensor_too_many_or_too_few_is_refused(world: World) -> None:
    """Claim: before any weight is taken; a tensor that nothing maps would be lost without a word."""
    engine = tiny.build(world)
    before = tiny.exported(engine)
    held = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    first = next(iter(held))
    for tensors, message in (
        ({**held, "model.strange.weight": torch.zeros(1)}, r"not weights of the model, first 'model\.strange\.weight'"),
        ({name: tensor for name, tensor in held.items() if name != first}, "weights of the model are missing, first"),
    ):
        with pytest.raises(ConversionError, match=message):
            engine.load_hf(Held(tensors))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.exported(engine).items())


def test_buckets_are_bounded_in_what_they_carry(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: gradients of bf16 weights travel in float32, and so they are counted; one parameter may be too large."""
    engine, carried = tiny.build(world, dtype=torch.bfloat16), list[tuple[int, int]]()
    gather = engine.weights._gather

    def counting(bucket: Any, of: Any, dtype: torch.dtype) -> Any:
        carried.append((len(bucket), sum(entry.numel for entry in bucket) * dtype.itemsize))
        return gather(bucket, of, dtype)

    monkeypatch.setattr(engine.weights, "_gather", counting)
    for _ in engine.export_gradients(20_000):
        pass
    assert all(num_bytes <= 20_000 for count, num_bytes in carried if count > 1)
    assert max(num_bytes for count, num_bytes in carried if count > 1) > 10_000, "blind: no bucket is half full"
