"""Collectives on Python objects and numbers, with the group as an argument.

Each call is a fixed number of collectives whatever the data, so ranks with little to say stay in step. Objects travel
over groups of their own (``object_groups``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, distributed_c10d  # type: ignore[attr-defined]  # not in __all__

from prism_megatron.errors import PrismError
from prism_megatron.parallel.object_groups import object_group

T = TypeVar("T")


def shared_store(name: str) -> Store:
    """Keys and values that all ranks of the world see, apart from those under other names."""
    return PrefixStore(name, distributed_c10d._get_default_store())


def all_gather_objects(value: T, *, group: dist.ProcessGroup | None = None) -> list[T]:
    """``value`` of every rank of ``group`` (default: the world), in its order, on every rank. Tensors are on CPU."""
    size = dist.get_world_size(group)
    if size == 1:
        return [value]
    gathered: list[T | None] = [None] * size
    dist.all_gather_object(gathered, value, group=object_group(group))
    return gathered  # type: ignore[return-value]  # every slot has been filled


def gather_objects(value: T, *, group: dist.ProcessGroup | None = None) -> list[T] | None:
    """``value`` of every rank of ``group`` (default: the world), in its order, on its first rank; None on the others.

    Tensors are on CPU.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return [value]
    is_first = dist.get_rank(group) == 0
    gathered: list[T | None] | None = [None] * size if is_first else None
    dist.gather_object(value, gathered, group=object_group(group), group_dst=0)
    return gathered  # type: ignore[return-value]  # every slot has been filled


def broadcast_object(value: T | None, *, source: int, group: dist.ProcessGroup | None = None) -> T:
    """``value`` of rank ``source`` *of the group*, on every rank of it. Tensors must be on CPU."""
    if dist.get_world_size(group) == 1:
        return value  # type: ignore[return-value]  # the only rank is the source
    box = [value]
    dist.broadcast_object_list(box, group=object_group(group), group_src=source)
    return box[0]  # type: ignore[return-value]  # the source's value


def barrier() -> None:
    """Return when all ranks of the world are here; kernels that are under way are not waited for."""
    if dist.get_world_size() > 1:
        dist.barrier(group=object_group(None))


def on_main(work: Callable[[], T]) -> T:
    """What ``work`` gives on rank 0, on every rank; what it raises there ends every rank.

    Raises whatever ``work`` raises: an error of ours on all ranks, any other one on rank 0 and RuntimeError elsewhere.
    """
    answer: tuple[T | None, Exception | None] | None = None
    cause: Exception | None = None
    if dist.get_rank() == 0:
        try:
            answer = work(), None
        except Exception as error:  # noqa: BLE001  # raised again below, once the other ranks have been told
            cause = error
            answer = None, error if isinstance(error, PrismError) else RuntimeError(f"rank 0 failed: {error!r}")
    value, problem = broadcast_object(answer, source=0)
    if problem is not None:
        raise cause or problem
    return value  # type: ignore[return-value]  # there is one where there is no problem


def sum_numbers(
    numbers: Mapping[str, float], *, device: torch.device, group: dist.ProcessGroup | None = None
) -> dict[str, float]:
    """Sums over the ranks of ``group``, by name, in float64. Every rank must bring the same names."""
    return _reduce_numbers(numbers, dist.ReduceOp.SUM, device, group)


def max_numbers(
    numbers: Mapping[str, float], *, device: torch.device, group: dist.ProcessGroup | None = None
) -> dict[str, float]:
    """As ``sum_numbers``, with the largest instead of the sum."""
    return _reduce_numbers(numbers, dist.ReduceOp.MAX, device, group)


def _reduce_numbers(
    numbers: Mapping[str, float], op: dist.ReduceOp.RedOpType, device: torch.device, group: dist.ProcessGroup | None
) -> dict[str, float]:
    names = sorted(numbers)
    result = torch.tensor([numbers[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(result, op=op, group=group)
    return dict(zip(names, result.tolist(), strict=True))
