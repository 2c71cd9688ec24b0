"""FP8 is entered around decoder layers and nowhere else, and grouped experts load and export like single ones.

A world of one rank builds the tiny policy with FP8 in its config but torch's layers (Transformer Engine is absent);
the context is a fake that notes when it is open. Blind spot: what the real context does to real modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.precision import PrecisionConfig
from prism_megatron.conversion.mapping import WeightMapping
from prism_megatron.conversion.ops import Replicated
from prism_megatron.engine.batch import collate
from prism_megatron.engine.export import WeightTable
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.layers import fp8
from prism_megatron.engine.runtime import World
from prism_megatron.testing import GlooWorld
from prism_megatron.types import TokenSequence
from tests.distributed import tiny


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(1) as world:
        yield world


def contexts_seen(world: World, precision: PrecisionConfig) -> tuple[list[Any], dict[str, list[Any]], set[str | None]]:
    """Contexts entered, those open when each part ran, and what the vision tower's configs say of FP8."""
    model = Qwen3VLProvider(tiny.provider().shape, execution=Execution(precision=precision, layers="te"))
    config = model.transformer_config(ParallelConfig(), torch.bfloat16)
    model.execution = Execution(precision=precision, layers="torch")
    chunk = model.build_chunk(config, world.groups, pre_process=True, post_process=True, vp_stage=None)
    entered: list[Any] = []
    open_now: list[Any] = []
    during: dict[str, list[Any]] = {}

    @contextlib.contextmanager
    def fake_context(_config: Any, *number: int) -> Iterator[None]:
        entered.append(number)
        open_now.append(number)
        yield
        open_now.pop()

    parts = {"vision": chunk.vision_model, "embedding": chunk.embedding}
    parts |= {f"layer {number}": layer for number, layer in chunk.decoder.layers.numbered()}
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_args, name=name: during.update({name: list(open_now)}))
    row = TokenSequence((5, 6, 7), ())
    with mock.patch.object(fp8, "get_fp8_context", fake_context):
        chunk(collate([row], pad_token_id=0, multiple_of=4, device=world.device))
    tower = {module.config.fp8 for module in chunk.vision_model.modules() if hasattr(module, "config")}
    return entered, during, tower


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_each_layer_runs_in_its_own_context(gloo: GlooWorld, recipe: Any) -> None:
    (seen,) = gloo.run(contexts_seen, PrecisionConfig(fp8="hybrid", fp8_recipe=recipe))
    entered, during, tower = seen
    assert entered == [(0,), (1,), (2,), (3,)], "by its global number from 0, as Megatron counts spared layers"
    assert {name: open_now for name, open_now in during.items() if name.startswith("layer")} == {
        f"layer {number}": [(number,)] for number in range(4)
    }
    assert during["vision"] == during["embedding"] == []
    assert tower == {None}


def test_delayed_scaling_has_one_context_around_all_layers(gloo: GlooWorld) -> None:
    (seen,) = gloo.run(contexts_seen, PrecisionConfig(fp8="hybrid", fp8_recipe="delayed"))
    entered, during, tower = seen
    assert entered == [()]
    assert all(during[f"layer {number}"] == [()] for number in range(4))
    assert during["vision"] == during["embedding"] == []
    assert tower == {None}


def test_without_fp8_no_context_is_entered(gloo: GlooWorld) -> None:
    (seen,) = gloo.run(contexts_seen, PrecisionConfig())
    assert seen[0] == []


class GroupedExperts(nn.Module):
    """Parameters as Transformer Engine's grouped linears name them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        for linear in ("linear_fc1", "linear_fc2"):
            holder = nn.Module()
            for expert in range(2):
                holder.register_parameter(f"weight{expert}", nn.Parameter(torch.zeros(3, 2)))
            self.experts.add_module(linear, holder)


def round_trip(world: World) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What was loaded into grouped experts, what they then held, and what they exported."""
    mappings = [
        WeightMapping(
            (f"experts.{expert}.{linear}",),
            f"mlp.experts.local_experts.{expert}.{linear}.weight",
            Replicated(),
            hf_shapes=((3, 2),),
        )
        for expert in range(2)
        for linear in ("linear_fc1", "linear_fc2")
    ]
    source = tiny.NamedWeights({mapping.hf_names[0]: (3, 2) for mapping in mappings})
    chunk = nn.Module()
    chunk.mlp = GroupedExperts()
    table = WeightTable([chunk], lambda _layout: mappings, world.groups, num_experts=2)
    table.load(source, None)
    held = {name: parameter.detach().clone() for name, parameter in chunk.named_parameters()}
    return {name: source.get(name) for name in source.names()}, held, dict(table.export(8, None))


def test_grouped_experts_load_and_export_under_single_names(gloo: GlooWorld) -> None:
    """The oracle is the source itself, expert by expert; every expert's weights differ."""
    ((loaded, held, exported),) = gloo.run(round_trip)
    for expert in range(2):
        for linear in ("linear_fc1", "linear_fc2"):
            wanted = loaded[f"experts.{expert}.{linear}"]
            assert torch.equal(held[f"mlp.experts.{linear}.weight{expert}"], wanted)
            assert torch.equal(exported[f"experts.{expert}.{linear}"], wanted)
