"""Per-token log-probabilities from vocabulary-parallel logits, without a second copy of the logits in fp32.

Shape suffixes: S tokens, B rows, V this rank's vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_ELEMENTS = 2**22
"""fp32 elements that one chunk of tokens may take (16 MiB)."""


def vocab_parallel_logprobs(
    logits_S_B_V: Tensor,
    targets_B_S: Tensor,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probability of each target under ``softmax(logits / temperature)``: fp32 ``[B, S]``, alike on every TP rank.

    Rank r of ``tp_group`` holds the columns ``[r V, (r+1) V)``; columns from ``vocab_size`` on are padding and get no
    probability. ``targets_B_S`` are ids below ``vocab_size``. Two all-reduces of ``[S, B]`` forward, none backward;
    the gradient has the dtype of the logits. The plain twin is ``log_softmax`` over the gathered logits.
    """
    result: Tensor = _VocabParallelLogprobs.apply(  # type: ignore[no-untyped-call]  # torch's Function.apply
        logits_S_B_V, targets_B_S.transpose(0, 1), tp_group, vocab_size, temperature
    )
    return result.transpose(0, 1)


class _VocabParallelLogprobs(torch.autograd.Function):
    """Chunks of tokens pass through fp32 one at a time; only the log-normaliser ``[S, B]`` is kept for backward."""

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd functions take positional arguments only
        ctx: Any,
        logits_S_B_V: Tensor,
        targets_S_B: Tensor,
        group: dist.ProcessGroup,
        vocab_size: int,
        temperature: float,
    ) -> Tensor:
        first_column = group.rank() * logits_S_B_V.shape[-1]
        num_real = min(max(vocab_size - first_column, 0), logits_S_B_V.shape[-1])
        shape = logits_S_B_V.shape[:2]
        local_max_S_B = torch.empty(shape, dtype=torch.float32, device=logits_S_B_V.device)
        sum_and_target_2_S_B = torch.empty((2, *shape), dtype=torch.float32, device=logits_S_B_V.device)
        for part in _chunks(logits_S_B_V):
            scaled = _scaled(logits_S_B_V[part], num_real, temperature)
            columns, here = _local_columns(targets_S_B[part], first_column, scaled.shape[-1])
            local_max_S_B[part] = scaled.amax(-1)
            sum_and_target_2_S_B[0, part] = (scaled - local_max_S_B[part].unsqueeze(-1)).exp().sum(-1)
            sum_and_target_2_S_B[1, part] = scaled.gather(-1, columns).squeeze(-1).masked_fill(~here, 0.0)
        max_S_B = local_max_S_B.clone()
        dist.all_reduce(max_S_B, op=dist.ReduceOp.MAX, group=group)
        sum_and_target_2_S_B[0] *= (local_max_S_B - max_S_B).exp()
        dist.all_reduce(sum_and_target_2_S_B, group=group)
        log_normaliser_S_B = max_S_B + sum_and_target_2_S_B[0].log()
        ctx.save_for_backward(logits_S_B_V, targets_S_B, log_normaliser_S_B)
        ctx.first_column, ctx.num_real, ctx.temperature = first_column, num_real, temperature
        return sum_and_target_2_S_B[1] - log_normaliser_S_B

    @staticmethod
    def backward(ctx: Any, grad_S_B: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_S_B_V, targets_S_B, log_normaliser_S_B = ctx.saved_tensors
        grad_logits_S_B_V = torch.empty_like(logits_S_B_V)
        for part in _chunks(logits_S_B_V):
            scaled = _scaled(logits_S_B_V[part], ctx.num_real, ctx.temperature)
            columns, here = _local_columns(targets_S_B[part], ctx.first_column, scaled.shape[-1])
            grad = (scaled - log_normaliser_S_B[part].unsqueeze(-1)).exp_().neg_()
            grad.scatter_add_(-1, columns, here.to(grad.dtype).unsqueeze(-1))
            grad_logits_S_B_V[part] = grad * (grad_S_B[part] / ctx.temperature).unsqueeze(-1)
        return grad_logits_S_B_V, None, None, None, None


def _chunks(logits_S_B_V: Tensor) -> Iterator[slice]:
    """Ranges of tokens that take at most ``_CHUNK_ELEMENTS`` elements each."""
    num_tokens, rows, columns = logits_S_B_V.shape
    step = max(1, _CHUNK_ELEMENTS // max(1, rows * columns))
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


def _scaled(logits: Tensor, num_real: int, temperature: float) -> Tensor:
    """A fresh fp32 copy, divided by the temperature, with padding columns at the smallest finite number."""
    scaled = logits.to(torch.float32, copy=True).div_(temperature)
    scaled[..., num_real:] = torch.finfo(torch.float32).min
    return scaled


def _local_columns(targets: Tensor, first_column: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Column of each target on this rank ``[…, 1]``, and whether it is here at all."""
    columns = targets - first_column
    here = (columns >= 0) & (columns < num_columns)
    return columns.clamp(0, num_columns - 1).unsqueeze(-1), here
