"""Megatron's AdamW for one role: how it is configured, stepped and counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from prism_megatron.config.engine.optimizer import OptimizerConfig


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
    State is allocated here, so a checkpoint can be taken or loaded at any step.
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
    set_adam_step(optimizer, 0)
    return optimizer


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
                for moment in ("exp_avg", "exp_avg_sq"):
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


def shards_of(state: Any) -> Any:
    """The sharded tensors of a nested Megatron state, in its structure; groups, counts and objects are left out."""
    shards, _ = extract_matching_values(state, _is_shard, return_lists_as_dicts=True)
    return shards


def sharded_state(optimizer: ChainedOptimizer, model_shards: Any, metadata: dict[str, Any], *, is_loading: bool) -> Any:
    """Masters and moments as sharded tensors under their parameters' names, so that any layout can read them."""
    return shards_of(optimizer.sharded_state_dict(model_shards, is_loading=is_loading, metadata=metadata))


def restore_state(
    optimizer: ChainedOptimizer, loaded: Any, model_shards: Any, metadata: dict[str, Any], *, step: int
) -> None:
    """Put back what ``sharded_state`` gave. Rates and decay are the present config's; ``step`` is Adam's count."""
    parts = optimizer.chained_optimizers
    # Megatron leaves a count of 0 out of its state, and torch then misses it.
    set_adam_step(optimizer, max(1, step))
    own = optimizer.sharded_state_dict(model_shards, is_loading=True, metadata=metadata)
    for index, part in enumerate(parts):
        part_own, part_loaded = (own, loaded) if len(parts) == 1 else (own[index], loaded[index])
        if isinstance(part, DistributedOptimizer):
            # Megatron's load expects torch's per-parameter count among the loaded tensors, but never saves it there.
            for state in part.optimizer.state.values():
                state.pop("step", None)
            part.load_parameter_state_from_fully_reshardable(part_loaded["param_state"])
        else:
            part.load_state_dict(_filled(part_own, part_loaded))
    set_adam_step(optimizer, step)


def _is_shard(value: Any) -> bool:
    return isinstance(value, ShardedTensor | ShardedTensorFactory)


def _filled(state: Any, loaded: Any) -> Any:
    """``state`` with every shard replaced by what was loaded for it; lists are dicts by position in ``loaded``."""
    if _is_shard(state):
        return loaded
    if isinstance(state, LocalNonpersistentObject):
        return state.unwrap()
    found = loaded if isinstance(loaded, dict) else {}
    if isinstance(state, dict):
        return {key: _filled(value, found.get(key)) for key, value in state.items()}
    if isinstance(state, list):
        return [_filled(value, found.get(index)) for index, value in enumerate(state)]
    return state


def inner_optimizers(optimizer: ChainedOptimizer) -> Iterator[Any]:
    """The torch, Transformer Engine or Apex optimizers inside; experts have one of their own."""
    for part in optimizer.chained_optimizers:
        if not getattr(part, "is_stub_optimizer", False):
            yield part.optimizer
