"""What a model's config says reaches Megatron's config and the modules (values that are no defaults)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.model import FreezeGroup
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.precision import PrecisionConfig
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.layers.norms import RMSNorm
from prism_megatron.engine.runtime import World
from tests.distributed import tiny


def provider_with(**text: Any) -> Qwen3VLProvider:
    config = {**tiny.CONFIG, "text_config": {**tiny.CONFIG["text_config"], **text}}
    return Qwen3VLProvider(Qwen3VLShape.from_dict(config))


def test_the_norms_of_a_model_have_its_epsilon(world: World) -> None:
    """Claim: those of layers, of queries and keys, and the last one."""
    engine = MegatronEngine(
        name="policy",
        provider=provider_with(rms_norm_eps=0.03),
        world=world,
        dtype=torch.float32,
        optimizer=None,
        total_steps=1,
    )
    norms = [part for part in engine.modules[0].modules() if isinstance(part, RMSNorm)]
    assert len(norms) == 4 * 4 + 1
    assert {norm.eps for norm in norms} == {0.03}


def test_uneven_ends_are_on_their_sides() -> None:
    parallel = ParallelConfig(pp=3, first_stage_layers=1, last_stage_layers=2)
    config = provider_with(num_hidden_layers=6).transformer_config(parallel, torch.float32)
    assert config.num_layers_in_first_pipeline_stage == 1
    assert config.num_layers_in_last_pipeline_stage == 2


def test_freezing_vision_freezes_all_of_it_and_nothing_else(world: World) -> None:
    """Claim: embeddings, blocks and all mergers of the tower stay; every weight of the language model learns."""
    engine = tiny.build(world, freeze_vision=True, optimizer=OptimizerConfig())
    for name, parameter in engine.modules[0].named_parameters():
        assert parameter.requires_grad == (not name.startswith("vision_model.")), name


@pytest.mark.parametrize("part", ["vision", "projector", "router"])
def test_each_part_is_frozen_by_its_name_alone(part: FreezeGroup) -> None:
    """Claim: the tower without its mergers, the mergers without the tower, the routers without their experts."""
    parts = {
        "vision_model.patch_embed.weight": "vision",
        "vision_model.pos_embed.weight": "vision",
        "vision_model.blocks.0.mlp.linear_fc1.weight": "vision",
        "vision_model.merger.linear_fc1.weight": "projector",
        "vision_model.deepstack_mergers.1.patch_norm.weight": "projector",
        "decoder.layers.3.mlp.router.weight": "router",
        "decoder.layers.3.mlp.experts.local_experts.0.linear_fc1.weight": None,
        "embedding.word_embeddings.weight": None,
        "output_layer.weight": None,
    }
    provider = Qwen3VLProvider(Qwen3VLShape.from_dict(tiny.CONFIG), freeze=[part])
    assert {name: provider.is_frozen(name) for name in parts} == {name: own == part for name, own in parts.items()}


@pytest.mark.parametrize("fp32", [False, True])
def test_an_fp32_head_is_the_policys(world: World, *, fp32: bool) -> None:
    """Claim: the flag reaches what the last chunk returns; a policy in bf16 then has fp32 logits."""
    execution = Execution(precision=PrecisionConfig(fp32_head=fp32))
    provider = Qwen3VLProvider(Qwen3VLShape.from_dict(tiny.CONFIG), execution=execution)
    engine = MegatronEngine(
        name="policy", provider=provider, world=world, dtype=torch.bfloat16, optimizer=None, total_steps=1
    )
    engine.load_hf(tiny.weights(tiny.provider()))
    batches, _ = tiny.batches_of(world, 0)
    with torch.no_grad():
        output = engine.modules[0](batches[0])
    assert output.fp32 is fp32
    assert output.logits().dtype is (torch.float32 if fp32 else torch.bfloat16)
