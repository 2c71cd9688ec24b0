"""What each rank does in the tests of policies with experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.conversion.expert_layout import ExpertLayout
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.parity.ranks import run_samples
from prism_megatron.parity.samples import sample_sets

OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.0, eps=1.0)
"""``eps`` is so large that an update is nearly proportional to its gradient: tiny ones do not become full steps."""


def build(world: World, shape: Qwen3VLShape, source: TensorSource) -> MegatronEngine:
    engine = MegatronEngine(
        name="policy",
        provider=Qwen3VLProvider(shape),
        world=world,
        dtype=torch.float32,
        optimizer=OPTIMIZER,
        total_steps=1,
    )
    engine.load_hf(source)
    return engine


def load_and_export(
    world: World, shape: Qwen3VLShape, source: TensorSource, bucket_bytes: int, layouts: Sequence[ExpertLayout | None]
) -> list[list[tuple[str, Tensor]]]:
    """What is exported after loading in each of the layouts, in its order."""
    engine = build(world, shape, source)
    return [list(engine.export_hf(bucket_bytes, layout=layout)) for layout in layouts]


@dataclass(frozen=True)
class Step:
    """One AdamW step: the whole gradients that it saw, their norm, and the weights after it."""

    gradients: dict[str, Tensor]
    norm: float
    weights: dict[str, Tensor]


def one_step(world: World, shape: Qwen3VLShape, source: TensorSource) -> Step:
    engine = build(world, shape, source)
    run_samples(engine, shape, sample_sets()["three sizes"], pack=False)
    gradients = {name: gradient.clone() for name, gradient in engine.export_gradients()}
    return Step(gradients, engine.step().grad_norm, dict(engine.export_hf()))
