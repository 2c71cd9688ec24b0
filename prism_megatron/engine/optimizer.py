"""Megatron's AdamW for one role: how it is configured, stepped and counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from prism_megatron.config.optimizer import OptimizerConfig


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    config: OptimizerConfig,
    *,
    dtype: torch.dtype,
    distributed: bool,
    groups: ProcessGroupCollection,
) -> MegatronOptimizer:
    """AdamW over the trainable parameters of ``chunks``, with fp32 master weights where ``dtype`` is bf16.

    ``distributed`` shards masters and moments over data-parallel ranks. Biases and other vectors are not decayed
    (Megatron's default). State is allocated here, so a checkpoint can be taken or loaded at any step.
    """
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.lr * config.min_lr_ratio,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
        ),
        list(chunks),
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    set_adam_step(optimizer, 0)
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Use ``lr`` from the next step on, in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def adam_step(optimizer: MegatronOptimizer) -> int:
    """Updates that Adam's bias correction has counted so far."""
    for inner in _inner_optimizers(optimizer):
        for group in inner.param_groups:
            if "step" in group:  # Transformer Engine and Apex count per group
                return int(group["step"])
        for state in inner.state.values():
            return int(state["step"])
    return 0


def set_adam_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Set Adam's count for every parameter, and allocate moments (zeros) that are not there yet.

    Every parameter gets a count of its own: Megatron's distributed optimizer shares one tensor between all of them
    when it loads, and torch's AdamW would then advance it once per parameter.
    """
    for inner in _inner_optimizers(optimizer):
        per_parameter = isinstance(inner, torch.optim.AdamW)
        for group in inner.param_groups:
            if not per_parameter:
                group["step"] = step
            for parameter in group["params"]:
                state = inner.state[parameter]
                for moment in ("exp_avg", "exp_avg_sq"):
                    if moment not in state:
                        state[moment] = torch.zeros_like(parameter, dtype=torch.float32)
                if per_parameter:
                    state["step"] = torch.tensor(float(step), dtype=torch.float32)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Global L2 norm of the finished gradients, before clipping; the same on every rank. Infinite if any is not finite."""
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    return norm if math.isfinite(norm) else math.inf


def _inner_optimizers(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """The torch, Transformer Engine or Apex optimizers inside; experts have one of their own."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not getattr(part, "is_stub_optimizer", False):
            yield part.optimizer
