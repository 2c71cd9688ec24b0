"""What each rank does in the parity tests of policies with experts, through ``MegatronEngine``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.optimizer import OptimizerConfig
from prism_megatron.config.recompute import RecomputeConfig
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.conversion.ops import Replicated
from prism_megatron.engine.batch import Batch
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.provider import LossOutput, PassOutput
from prism_megatron.engine.runtime import World
from tests.parity.discriminator_ranks import full_gradients
from tests.parity.qwen3_vl_oracle import probe, shape_of, tiny_batch

KEEP = RecomputeConfig()
STILL = OptimizerConfig(lr=0.0, weight_decay=0.0)
MOVING = OptimizerConfig(lr=1e-2, weight_decay=0.0, eps=1.0)
"""``eps`` is so large that an update is nearly proportional to its gradient: tiny ones do not become full steps."""


@dataclass(frozen=True)
class MoeResult:
    """Logits ``[B, S, V/tp]`` by case, this rank's gradients of replicated weights, all gradients on rank 0."""

    tp_rank: int
    logits: dict[str, Tensor]
    replicated: dict[str, Tensor]
    gradients: dict[str, Tensor]
    grad_norm: float


def build(
    world: World,
    config: Mapping[str, Any],
    source: TensorSource,
    *,
    recompute: RecomputeConfig = KEEP,
    optimizer: OptimizerConfig = STILL,
) -> MegatronEngine:
    engine = MegatronEngine(
        name="policy",
        provider=Qwen3VLProvider(shape_of(config), recompute=recompute),
        world=world,
        dtype=torch.float32,
        optimizer=optimizer,
        total_steps=1,
    )
    engine.load_hf(source)
    return engine


def probed(engine: MegatronEngine, config: Mapping[str, Any], cases: Sequence[str]) -> tuple[PassOutput, Sequence[str]]:
    """Gradients of ``probe``'s loss, and the cases that this data-parallel rank ran; rows hold their logits."""
    world, vocab = engine.world, shape_of(config).text.vocab
    mine = cases[world.dp_rank :: world.dp_size]

    def loss(output: Tensor, batch: Batch) -> LossOutput:
        columns = output.shape[-1]
        weights = torch.nn.functional.pad(probe(batch, vocab), (0, columns * world.parallel.tp - vocab))
        share = weights[..., world.tp_rank * columns :][..., :columns].transpose(0, 1)
        return LossOutput((output * share).sum(), {}, {"logits": output.detach().transpose(0, 1)})

    batches = [tiny_batch(case, multiple_of=world.parallel.length_multiple) for case in mine]
    return engine.forward_backward(batches, loss), mine


def run_policy(
    world: World, config: Mapping[str, Any], source: TensorSource, cases: Sequence[str], recompute: RecomputeConfig
) -> MoeResult:
    """Forward and backward of one micro-batch per case, shared out over data-parallel ranks (see ``probe``)."""
    engine = build(world, config, source, recompute=recompute)
    output, mine = probed(engine, config, cases)
    by_name = {name: p.main_grad for module in engine.modules for name, p in module.named_parameters()}
    whole = {m.parameter for m in Qwen3VLProvider(shape_of(config)).weight_mappings() if isinstance(m.op, Replicated)}
    replicated = {name: gradient.clone() for name, gradient in by_name.items() if name in whole}
    gradients = full_gradients(engine)
    return MoeResult(
        tp_rank=world.tp_rank,
        logits={case: rows["logits"] for case, rows in zip(mine, output.rows, strict=True)},
        replicated=replicated,
        gradients=gradients if world.is_main else {},
        grad_norm=engine.step().grad_norm,
    )


def load_and_export(
    world: World, config: Mapping[str, Any], source: TensorSource, bucket_bytes: int
) -> list[tuple[str, Tensor]]:
    """What is exported after loading, in its order."""
    engine = build(world, config, source)
    return list(engine.export_hf(bucket_bytes))


def one_step(
    world: World, config: Mapping[str, Any], source: TensorSource, cases: Sequence[str]
) -> tuple[float, dict[str, Tensor]]:
    """The gradient norm of one AdamW step and the weights after it."""
    engine = build(world, config, source, optimizer=MOVING)
    probed(engine, config, cases)
    norm = engine.step().grad_norm
    return norm, dict(engine.export_hf())
