"""Megatron's AdamW for one role: how it is configured, stepped and counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.engine.pieces import Stretch

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(
    chunks: Sequence[DistributedDataParallel],
    config: OptimizerConfig,
    *,
    dtype: torch.dtype,
    distributed: bool,
    overlap_param_gather: bool = False,
    groups: ProcessGroupCollection,
) -> ChainedOptimizer:
    """AdamW over the trainable parameters of ``chunks``, with fp32 master weights where ``dtype`` is bf16.

    ``distributed`` shards masters and moments over data-parallel ranks. Every parameter is decayed, norms and biases
    included, as plain AdamW does: Megatron spares vectors only through its own scheduler, which is not used.
    State is allocated here, so a checkpoint can be taken or loaded at any step. torch's AdamW goes tensor by tensor.
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
            overlap_param_gather=overlap_param_gather,
        ),
        list(chunks),
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    _update_one_by_one(optimizer)
    set_adam_step(optimizer, 0)
    return optimizer


def _update_one_by_one(optimizer: ChainedOptimizer) -> None:
    """Have torch's AdamW update a tensor at a time, which takes temporary memory for one of them.

    Left open, it takes all of them at once on CUDA, which is faster and needs several more copies of the shard. The
    fused optimizers of Transformer Engine and Apex need none, and are left alone. On CPUs this is torch's own choice.
    """
    for inner in inner_optimizers(optimizer):
        if isinstance(inner, torch.optim.AdamW):
            for group in inner.param_groups:
                group["foreach"] = False


def set_learning_rate(optimizer: ChainedOptimizer, lr: float) -> None:
    """Use ``lr`` from the next step on, in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def adam_step(optimizer: ChainedOptimizer) -> int:
    """Updates that Adam's bias correction has counted so far."""
    for inner in inner_optimizers(optimizer):
        counts = inner.state.values() if _counts_per_parameter(inner) else inner.param_groups
        for holder in counts:
            return int(holder.get("step", 0))
    return 0


def set_adam_step(optimizer: ChainedOptimizer, step: int) -> None:
    """Set Adam's count for every parameter, and allocate moments (zeros) that are not there yet.

    Every parameter gets a count of its own: Megatron's distributed optimizer shares one tensor between all of them
    when it loads, and torch's AdamW would then advance it once per parameter.
    """
    for inner in inner_optimizers(optimizer):
        per_parameter = _counts_per_parameter(inner)
        for group in inner.param_groups:
            if not per_parameter:
                group["step"] = step
            else:
                group.pop("step", None)  # left by Megatron's load; nothing would advance it
            for parameter in group["params"]:
                state = inner.state[parameter]
                for moment in MOMENTS:
                    if moment not in state:
                        state[moment] = torch.zeros_like(parameter, dtype=torch.float32)
                if per_parameter:
                    state["step"] = torch.tensor(float(step), dtype=torch.float32)


def _counts_per_parameter(inner: Any) -> bool:
    """torch's AdamW counts steps per parameter; Transformer Engine's and Apex's per group."""
    return isinstance(inner, torch.optim.AdamW)


def gradient_norm(optimizer: ChainedOptimizer) -> float:
    """Global L2 norm of the finished gradients before clipping, on every rank; infinite if one is not finite."""
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    return norm if math.isfinite(norm) else math.inf


def state_stretches(optimizer: ChainedOptimizer, where: Callable[[Tensor], Tensor]) -> Iterator[Stretch]:
    """Masters and moments that this rank keeps, under the prefixes that Megatron's checkpoints give them.

    ``where`` says of a state in which tensor its numbers are, which may have been put away (``engine/offload.py``).
    """
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False):
            continue
        is_sharded = isinstance(part, DistributedOptimizer)
        for parameter, start, named in _sharded_states(part) if is_sharded else _whole_states(part):
            for name, state in named.items():
                yield Stretch(
                    parameter=parameter,
                    prefix=f"optimizer.state.{name}.",
                    elements=where(state).detach().view(-1),
                    start=start,
                    is_replicated=not is_sharded,
                )


_States = Iterator[tuple[Tensor, int, dict[str, Tensor]]]
"""A model's parameter, where in it the states begin, and these by name."""


def _sharded_states(part: DistributedOptimizer) -> _States:
    for parameter, (group, place) in part.model_param_group_index_map.items():
        master = part.optimizer.param_groups[group]["params"][place]
        start = part._get_model_param_range_map(parameter)["param"].start
        yield parameter, start, {"param": master, **_moments(part.optimizer, master)}


def _whole_states(part: Any) -> _States:
    """Of an optimizer that every data-parallel rank has whole: masters of their own for bf16 parameters alone."""
    masters = {
        id(master): parameter
        for parameters, copies in zip(
            getattr(part, "float16_groups", ()), getattr(part, "fp32_from_float16_groups", ()), strict=True
        )
        for parameter, master in zip(parameters, copies, strict=True)
    }
    for group in part.optimizer.param_groups:
        for updated in group["params"]:
            parameter = masters.get(id(updated))
            own = {} if parameter is None else {"fp32_param": updated}
            yield updated if parameter is None else parameter, 0, {**own, **_moments(part.optimizer, updated)}


def _moments(inner: Any, updated: Tensor) -> dict[str, Tensor]:
    return {name: inner.state[updated][name] for name in MOMENTS}


def inner_optimizers(optimizer: ChainedOptimizer) -> Iterator[Any]:
    """The torch, Transformer Engine or Apex optimizers inside; experts have one of their own."""
    for part in optimizer.chained_optimizers:
        if not getattr(part, "is_stub_optimizer", False):
            yield part.optimizer
