"""What scaling rests on, counted: bytes of a rank, and collectives of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.towers import Towers
from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.model import ALL_VISION, FreezeGroup
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.host.memory import RankBytes, bytes_of_rank
from prism_megatron.engine.offload import own_state
from prism_megatron.engine.provider import ModelProvider
from prism_megatron.engine.runtime import World
from prism_megatron.testing import GlooWorld
from prism_megatron.training.batches import BatchFormat, supervised_batch
from prism_megatron.training.supervised_update import learn
from tests.distributed import tiny
from tests.distributed.test_policy_experts import CONFIG as EXPERTS

WIDE = {
    **tiny.CONFIG,
    "text_config": {**tiny.CONFIG["text_config"], "hidden_size": 128, "intermediate_size": 512, "vocab_size": 1000},
    "vision_config": {**tiny.CONFIG["vision_config"], "out_hidden_size": 128},
}
"""So wide that Megatron's padding of buffers is below the tolerance."""
WIDE_EXPERTS = {
    **EXPERTS,
    "text_config": {**EXPERTS["text_config"], "hidden_size": 128, "moe_intermediate_size": 128},
    "vision_config": {**EXPERTS["vision_config"], "out_hidden_size": 128},
}
MODELS = {"dense": WIDE, "experts": WIDE_EXPERTS}


def provider_of(model: str, freeze: tuple[FreezeGroup, ...]) -> ModelProvider:
    """A policy of ``MODELS``, or the discriminator that is upcycled from the dense one."""
    if model == "discriminator":
        return DiscriminatorProvider(Qwen3VLShape.from_dict(WIDE), Towers(), freeze_vision=bool(freeze))
    return Qwen3VLProvider(Qwen3VLShape.from_dict(MODELS[model]), freeze=freeze)


CASES = {
    "TP2-DP2": ("dense", ParallelConfig(tp=2), (), torch.bfloat16),
    "TP1-DP4": ("dense", ParallelConfig(), (), torch.bfloat16),
    "TP2-DP2 fp32": ("dense", ParallelConfig(tp=2), (), torch.float32),
    "TP1-DP4 frozen vision": ("dense", ParallelConfig(), ALL_VISION, torch.bfloat16),
    "DP4 replicated": ("dense", ParallelConfig(distributed_optimizer=False), (), torch.bfloat16),
    "CP2-DP2": ("dense", ParallelConfig(cp=2), (), torch.bfloat16),
    "EP2-DP4": ("experts", ParallelConfig(ep=2), (), torch.bfloat16),
    "TP2-DP2-EP2": ("experts", ParallelConfig(tp=2, ep=2, etp=1), (), torch.bfloat16),
    "discriminator EP2-DP4": ("discriminator", ParallelConfig(ep=2), ALL_VISION, torch.bfloat16),
}


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


def engine_of(world: World, model: str, freeze: tuple[FreezeGroup, ...], dtype: torch.dtype) -> MegatronEngine:
    provider = provider_of(model, freeze)
    return MegatronEngine(
        name="policy", provider=provider, world=world, dtype=dtype, optimizer=OptimizerConfig(), total_steps=4
    )


def held(world: World, model: str, freeze: tuple[FreezeGroup, ...], dtype: torch.dtype) -> RankBytes:
    """Of this rank, by its tensors' storage."""
    engine = engine_of(world, model, freeze, dtype)
    assert engine.optimizer is not None
    chunks: Any = engine._chunks
    buffers = [one for chunk in chunks for one in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return RankBytes(
        sum(parameter.nbytes for module in engine.modules for parameter in module.parameters()),
        sum(buffer.grad_data.nbytes for buffer in buffers),
        sum(tensor.nbytes for tensor in own_state(chunks, engine.optimizer)),
    )


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_the_bytes_of_the_formula(gloo: GlooWorld, case: str) -> None:
    """Claim: parameters, gradients and optimizer state of every rank within 1 %; ``pytest -rP`` prints them."""
    model, parallel, freeze, dtype = CASES[case]
    provider = provider_of(model, freeze)
    wanted = bytes_of_rank(
        provider.weight_mappings(), parallel, world_size=4, dtype=dtype, is_frozen=provider.is_frozen
    )
    ranks = gloo.run(held, model, freeze, dtype, parallel=parallel)
    print(f"{case}: formula {wanted}; measured {ranks[0]}")
    for found in ranks:
        assert found.parameters == pytest.approx(wanted.parameters, rel=0.01)
        assert found.gradients == pytest.approx(wanted.gradients, rel=0.01)
        assert found.optimizer == pytest.approx(wanted.optimizer, rel=0.01)


def counted(world: World, records: int, microbatches: int) -> Counter[str]:
    """Of one step on so many records a data-parallel rank, packed into so many micro-batches."""
    provider = Qwen3VLProvider(Qwen3VLShape.from_dict(tiny.CONFIG), freeze=ALL_VISION)
    engine = MegatronEngine(
        name="policy", provider=provider, world=world, dtype=torch.float32, optimizer=OptimizerConfig(), total_steps=4
    )
    engine.load_hf(tiny.weights(provider))
    form = BatchFormat(pad_token_id=tiny.PAD, end_token_id=1, length_multiple=world.parallel.length_multiple,
                       device=world.device)  # fmt: skip
    rows = [row for step in range(-(-records // 8)) for row in tiny.rows(step)][:records]
    size = records // microbatches
    batches = [
        supervised_batch([row for row, _ in part], [mask for _, mask in part], form=form, pack=True)
        for part in (rows[first : first + size] for first in range(0, records, size))
    ]
    learn(engine, batches, world=world)  # the first step allocates and checks
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        learn(engine, batches, world=world)
    return Counter(event.name for event in profiled.events() if event.name.startswith("c10d::"))


LAYOUTS = {
    "TP2-DP2": ParallelConfig(tp=2),
    "TP1-DP4": ParallelConfig(),
    "PP2-DP2": ParallelConfig(pp=2),
    "CP2-DP2": ParallelConfig(cp=2),
}
PER_MICROBATCH = {
    "TP1-DP4": set(),
    "TP2-DP2": {"c10d::allreduce_"},
    "PP2-DP2": {"c10d::send", "c10d::recv_"},
    "CP2-DP2": {"c10d::_allgather_base_", "c10d::_reduce_scatter_base_"},
}
"""What grows with the number of micro-batches: the layers' sums of tensor parallelism, what pipeline stages send each
other, and the keys, values and image features that context-parallel ranks share."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_collectives_do_not_grow_with_the_records(gloo: GlooWorld, layout: str) -> None:
    """Claim: a step on four times the records in as many micro-batches has the same collectives on every rank.

    With twice the micro-batches those grow that are listed, and no others: gradients are summed, and weights gathered,
    once a step. Blind spots: gloo; how NCCL groups what it is given. The output layer sums twice over tensor-parallel
    ranks for every chunk of labelled tokens (2^25 logits a rank), and here all labels of a micro-batch are one chunk.
    """
    few, many, more = (
        gloo.run(counted, records, microbatches, parallel=LAYOUTS[layout])
        for records, microbatches in ((8, 2), (32, 2), (32, 4))
    )
    print(f"{layout}: {dict(few[0])}; with twice the micro-batches {dict(more[0])}")
    assert few == many
    assert all(sum(counts.values()) > 5 for counts in few)
    for once, twice in zip(few, more, strict=True):
        assert {name for name in twice if twice[name] != once[name]} <= PER_MICROBATCH[layout]
    if PER_MICROBATCH[layout]:
        assert more != few
