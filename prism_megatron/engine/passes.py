"""One pass over micro-batches: Megatron's forward step, gradients that are not reduced yet, what losses returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from prism_megatron.engine.batch import Batch
from prism_megatron.engine.provider import LossFn, LossOutput, PassOutput
from prism_megatron.engine.runtime import World
from prism_megatron.observability.activity import Advance
from prism_megatron.parallel.collectives import broadcast_object, max_numbers, sum_numbers


@contextmanager
def unreduced(config: TransformerConfig, chunks: Sequence[Any]) -> Iterator[None]:
    """Passes inside add up gradients on each rank, and do not sum them over ranks."""
    kept = config.finalize_model_grads_func, config.no_sync_func
    config.finalize_model_grads_func = config.no_sync_func = None
    try:
        with ExitStack() as stack:
            for chunk in chunks:
                stack.enter_context(chunk.no_sync())
            yield
    finally:
        config.finalize_model_grads_func, config.no_sync_func = kept


def forward_step(
    batches: Iterator[Batch], chunk: MegatronModule, *, loss: LossFn, advance: Advance
) -> tuple[Any, Callable[[Any], tuple[Tensor, Tensor, LossOutput]]]:
    """Megatron's ``forward_step_func``; the second value is called on the last stage only."""
    batch = next(batches)

    def reduce(output: Any) -> tuple[Tensor, Tensor, LossOutput]:
        result = loss(output, batch)
        # Three values keep Megatron from dividing by the number of micro-batches; the count itself is not used.
        return result.loss, torch.zeros((), dtype=torch.int, device=result.loss.device), result

    output = chunk(batch)
    advance(1)
    return output, reduce


def shared_outputs(
    outputs: Sequence[LossOutput], measure: Callable[[], Mapping[str, float]], world: World
) -> PassOutput:
    """Bring what the last stage's losses returned to every stage; reduce sums and maxima over dp and cp ranks.

    ``measure`` adds sums that all ranks have alike; it is called when all stages are through.
    """
    payload = None
    if world.is_last_stage:
        sums: dict[str, float] = {}
        maxima: dict[str, float] = {}
        for output in outputs:
            for key, value in output.sums.items():
                sums[key] = sums.get(key, 0.0) + float(value)
            for key, value in output.maxima.items():
                maxima[key] = max(float(value), maxima.get(key, -math.inf))
        rows_of_batches = [{key: value.detach().cpu() for key, value in output.rows.items()} for output in outputs]
        payload = sums, maxima, rows_of_batches
    sums, maxima, rows = broadcast_object(payload, source=world.parallel.pp - 1, group=world.groups.pp)
    measured = measure()
    return PassOutput(
        sums={**sum_numbers(sums, device=world.device, group=world.groups.dp_cp), **measured},
        maxima=max_numbers(maxima, device=world.device, group=world.groups.dp_cp) if maxima else {},
        rows=[{key: value.to(world.device) for key, value in row.items()} for row in rows],
    )
