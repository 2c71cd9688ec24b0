"""Per-token log-probabilities and entropy from vocabulary-parallel logits, without a second copy of them in fp32.

Shape suffixes: L tokens of this context-parallel rank, B rows, V this rank's vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_ELEMENTS = 2**22
"""fp32 elements that one chunk of tokens may take (16 MiB)."""


class TokenScores(NamedTuple):
    """Both in fp32, ``[B, L]``: log-probability of each target in nats, and entropy of its distribution in nats."""

    logprobs_B_L: Tensor
    entropy_B_L: Tensor


def vocab_parallel_scores(
    logits_L_B_V: Tensor,
    targets_B_L: Tensor,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float = 1.0,
) -> TokenScores:
    """Log-probability of each target under ``softmax(logits / temperature)`` and its entropy, alike on every TP rank.

    Rank r of ``tp_group`` holds the columns ``[r V, (r+1) V)``; columns from ``vocab_size`` on are padding and get no
    probability. ``targets_B_L`` are ids below ``vocab_size``. Two all-reduces of ``[L, B]`` numbers forward, none
    backward; both results are differentiable, and the gradient has the dtype of the logits. The plain twin is
    ``log_softmax`` over the gathered logits.
    """
    logprobs_L_B, entropy_L_B = _VocabParallelScores.apply(  # type: ignore[no-untyped-call]  # torch's Function.apply
        logits_L_B_V, targets_B_L.transpose(0, 1), tp_group, vocab_size, temperature
    )
    return TokenScores(logprobs_L_B.transpose(0, 1), entropy_L_B.transpose(0, 1))


class _VocabParallelScores(torch.autograd.Function):
    """Chunks of tokens pass through fp32 one at a time; two numbers a token are kept for backward.

    With x = logits / temperature, log-normaliser z and p = exp(x - z), the entropy is z - sum(p x), its gradient
    -p (x - z + entropy), and that of the target's log-probability is onehot - p.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd functions take positional arguments only
        ctx: Any,
        logits_L_B_V: Tensor,
        targets_L_B: Tensor,
        group: dist.ProcessGroup,
        vocab_size: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        first_column = group.rank() * logits_L_B_V.shape[-1]
        num_real = min(max(vocab_size - first_column, 0), logits_L_B_V.shape[-1])
        shape = logits_L_B_V.shape[:2]
        max_L_B = torch.empty(shape, dtype=torch.float32, device=logits_L_B_V.device)
        # Of exp(x - max), of exp(x - max) · (x - max), and the target's x.
        sums_3_L_B = torch.empty((3, *shape), dtype=torch.float32, device=logits_L_B_V.device)
        for part in _chunks(logits_L_B_V):
            scaled = _scaled(logits_L_B_V[part], num_real, temperature)
            columns, here = _local_columns(targets_L_B[part], first_column, scaled.shape[-1])
            max_L_B[part] = scaled.amax(-1)
            sums_3_L_B[2, part] = scaled.gather(-1, columns).squeeze(-1).masked_fill(~here, 0.0)
            scaled -= max_L_B[part].unsqueeze(-1)
            weights = scaled.exp()
            if num_real < scaled.shape[-1]:
                weights[..., num_real:] = 0.0  # also where a rank holds padding only, and its maximum is padding
            sums_3_L_B[0, part] = weights.sum(-1)
            sums_3_L_B[1, part] = weights.mul_(scaled).sum(-1)
        global_max_L_B = max_L_B.clone()
        dist.all_reduce(global_max_L_B, op=dist.ReduceOp.MAX, group=group)
        below_L_B = max_L_B - global_max_L_B
        sums_3_L_B[1] += below_L_B * sums_3_L_B[0]
        sums_3_L_B[:2] *= below_L_B.exp()
        dist.all_reduce(sums_3_L_B, group=group)
        log_sum_L_B = sums_3_L_B[0].log()
        log_normaliser_L_B = global_max_L_B + log_sum_L_B
        entropy_L_B = log_sum_L_B - sums_3_L_B[1] / sums_3_L_B[0]
        ctx.save_for_backward(logits_L_B_V, targets_L_B, log_normaliser_L_B, entropy_L_B)
        ctx.first_column, ctx.num_real, ctx.temperature = first_column, num_real, temperature
        ctx.set_materialize_grads(False)
        return sums_3_L_B[2] - log_normaliser_L_B, entropy_L_B

    @staticmethod
    def backward(
        ctx: Any, logprob_grad_L_B: Tensor | None, entropy_grad_L_B: Tensor | None
    ) -> tuple[Tensor, None, None, None, None]:
        logits_L_B_V, targets_L_B, log_normaliser_L_B, entropy_L_B = ctx.saved_tensors
        grad_logits_L_B_V = torch.empty_like(logits_L_B_V)
        for part in _chunks(logits_L_B_V):
            relative = _scaled(logits_L_B_V[part], ctx.num_real, ctx.temperature)
            relative -= log_normaliser_L_B[part].unsqueeze(-1)
            grad = relative.exp()
            if entropy_grad_L_B is None:
                assert logprob_grad_L_B is not None
                grad *= -logprob_grad_L_B[part].unsqueeze(-1)
            else:
                relative[..., ctx.num_real :] = 0.0  # the smallest finite number may have overflowed
                relative += entropy_L_B[part].unsqueeze(-1)
                relative *= entropy_grad_L_B[part].unsqueeze(-1)
                if logprob_grad_L_B is not None:
                    relative += logprob_grad_L_B[part].unsqueeze(-1)
                grad *= relative.neg_()
            if logprob_grad_L_B is not None:
                columns, here = _local_columns(targets_L_B[part], ctx.first_column, grad.shape[-1])
                grad.scatter_add_(-1, columns, here.unsqueeze(-1) * logprob_grad_L_B[part].unsqueeze(-1))
            grad_logits_L_B_V[part] = grad.div_(ctx.temperature)
        return grad_logits_L_B_V, None, None, None, None


def _chunks(logits_L_B_V: Tensor) -> Iterator[slice]:
    """Ranges of tokens that take at most ``_CHUNK_ELEMENTS`` elements each."""
    num_tokens, rows, columns = logits_L_B_V.shape
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
