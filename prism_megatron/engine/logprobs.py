"""Log-probabilities and entropies of labelled tokens, straight from hidden states and the output layer's weight.

Logits exist for a chunk of tokens at a time, forward and backward, and only for tokens that have a label: a response of
8k tokens over a vocabulary of 152k would take 5 GB of them.
Shape suffixes: L tokens of this context-parallel rank, B rows, N labelled tokens among them, n those of a chunk,
H hidden, V this rank's vocabulary columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_ELEMENTS = 2**25
"""Logits that a chunk may have; it takes two fp32 tensors of them (256 MiB), and gradients stay in the same two."""
_CACHED_ELEMENTS = 2**18
"""Logits that a CPU passes over at a time, so that several passes find them in its cache (1 MiB)."""
_CAST_ELEMENTS = 2**24
"""Elements of the weight that are held in fp32 at a time where products are to be in fp32 (64 MiB)."""


class TokenScores(NamedTuple):
    """Both in fp32, ``[B, L]``: log-probability of each target in nats, and entropy of its distribution in nats."""

    logprobs_B_L: Tensor
    entropy_B_L: Tensor


Chosen = Callable[[Tensor], Tensor]
"""Takes ``[B, L]`` to the ``[n]`` of a chunk's tokens."""

TokenLoss = Callable[[Tensor, Tensor, Chosen], Tensor]
"""Log-probs ``[n]``, entropies ``[n]``, what chooses the same tokens of other tensors; to a scalar that adds up."""


@dataclass(frozen=True, eq=False)
class VocabularyOutput:
    """What the last chunk of a policy returns: what logits are made of.

    ``hidden_L_B_H`` is whole on every tensor-parallel rank, of which rank r holds the rows ``[r V, (r+1) V)`` of the
    output layer as ``weight_V_H``; rows from ``vocab_size`` on are padding and get no probability. The gradient of
    ``hidden_L_B_H`` is this rank's part of a sum over ``tp_group``. With ``fp32`` logits, and what their gradient is
    multiplied by, are products in fp32 of what a bf16 model has: bf16 logits of 20 lie 0.125 apart.
    """

    hidden_L_B_H: Tensor
    weight_V_H: Tensor
    tp_group: dist.ProcessGroup
    vocab_size: int
    fp32: bool = False

    def logits(self) -> Tensor:
        """``[L, B, V]``, all at once; padding columns hold the dtype's minimum."""
        hidden_L_B_H, weight_V_H = self.hidden_L_B_H, self.weight_V_H
        if self.fp32:
            hidden_L_B_H, weight_V_H = hidden_L_B_H.float(), weight_V_H.float()
        logits_L_B_V = hidden_L_B_H @ weight_V_H.t()
        real = self._columns().num_real
        if real == logits_L_B_V.shape[-1]:
            return logits_L_B_V
        padding_V = torch.arange(logits_L_B_V.shape[-1], device=logits_L_B_V.device) >= real
        return logits_L_B_V.masked_fill(padding_V, torch.finfo(logits_L_B_V.dtype).min)

    def scores(self, targets_B_L: Tensor, places_N: Tensor, *, temperature: float = 1.0) -> TokenScores:
        """Under ``softmax(logits / temperature)``; alike on every rank of ``tp_group``, and 0 beside ``places_N``.

        ``places_N`` number the labelled tokens, counted as the hidden states have them, ``[L, B]`` (``places_of``).
        ``targets_B_L`` are ids below ``vocab_size``. Both are differentiable any number of ways; backward computes
        the logits a second time. The plain twin is ``log_softmax`` over the gathered logits.
        """
        found_2_N: Tensor = _Scores.apply(  # type: ignore[no-untyped-call]  # torch's Function.apply
            self._hidden(places_N), self.weight_V_H, _chosen(targets_B_L, places_N), self._columns(), temperature
        )
        return self._scattered(found_2_N, places_N)

    def learn(
        self,
        loss_of: TokenLoss,
        targets_B_L: Tensor,
        places_N: Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = True,
        at_once: bool = False,
    ) -> tuple[Tensor, TokenScores]:
        """A loss that is a sum over tokens, and the scores it was made of, detached.

        ``loss_of`` is called chunk by chunk. Gradients are found on the way, so that every logit is computed once. The
        loss is differentiable once. Entropies are NaN without ``with_entropy``, which spares a pass over all logits.
        With ``at_once`` ``loss_of`` is called once for all tokens, even for none, so that it may look at whole answers
        and talk to other ranks; where they are several chunks, every logit is then computed twice.
        """
        loss, found_2_N = _Learn.apply(  # type: ignore[no-untyped-call]  # torch's Function.apply
            self._hidden(places_N),
            self.weight_V_H,
            _chosen(targets_B_L, places_N),
            self._columns(),
            temperature,
            with_entropy,
            lambda logprobs_n, entropy_n, part: loss_of(logprobs_n, entropy_n, lambda of: _chosen(of, places_N[part])),
            torch.is_grad_enabled(),
            at_once,
        )
        return loss, self._scattered(found_2_N, places_N)

    def _hidden(self, places_N: Tensor) -> Tensor:
        # In the order of the hidden states: Megatron's all-reduce of their gradient is lost where it is transposed.
        return self.hidden_L_B_H.flatten(0, 1).index_select(0, places_N)

    def _columns(self) -> _Columns:
        fp32 = self.fp32 and self.weight_V_H.dtype != torch.float32
        return _Columns(self.tp_group, self.tp_group.rank() * len(self.weight_V_H), len(self.weight_V_H),
                        self.vocab_size, fp32)  # fmt: skip

    def _scattered(self, found_2_N: Tensor, places_N: Tensor) -> TokenScores:
        tokens, rows, _ = self.hidden_L_B_H.shape
        scores_2_T = found_2_N.new_zeros(2, tokens * rows).index_copy(1, places_N, found_2_N)
        return TokenScores(*scores_2_T.view(2, tokens, rows).transpose(1, 2))


def places_of(mask_B_L: Tensor) -> Tensor:
    """``[N]``: numbers of the tokens that a mask chooses, counted as hidden states have them, ``[L, B]``.

    The host waits for the device, to know how many they are; ``engine.batch.label_places`` knows them already.
    """
    return mask_B_L.t().flatten().nonzero().squeeze(1)


def _chosen(values_B_L: Tensor, places_N: Tensor) -> Tensor:
    return values_B_L.t().flatten().index_select(0, places_N)


@dataclass(frozen=True, eq=False)
class _Columns:
    """The vocabulary's columns that this rank has, and whether a weight of another dtype is cast to fp32 for them."""

    group: dist.ProcessGroup
    first: int
    count: int
    vocab_size: int
    fp32: bool

    @property
    def num_real(self) -> int:
        return min(max(self.vocab_size - self.first, 0), self.count)

    def of(self, targets_n: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each target ``[n, 1]``, and whether it is here at all ``[n]``."""
        columns = targets_n - self.first
        here = (columns >= 0) & (columns < self.count)
        return columns.clamp(0, self.count - 1).unsqueeze(-1), here

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """Ranges of tokens of at most ``_CHUNK_ELEMENTS`` logits each; the same on every rank of the group."""
        step = max(1, _CHUNK_ELEMENTS // self.count)
        for start in range(0, num_tokens, step):
            yield slice(start, min(start + step, num_tokens))

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """Over the ranks that have the other columns, in place."""
        if self.group.size() > 1:
            dist.all_reduce(values, op=op, group=self.group)

    def logits(self, hidden_n_H: Tensor, weight_V_H: Tensor) -> Tensor:
        """``[n, V]`` in fp32: rounded to the weight's dtype before, unless it is cast."""
        if not self.fp32:
            return (hidden_n_H @ weight_V_H.t()).float()
        wide_n_H = hidden_n_H.float()
        return torch.cat([wide_n_H @ weight.t() for _, weight in self.cast(weight_V_H)], dim=-1)

    def cast(self, weight_V_H: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The weight in fp32, some of its rows at a time, with the columns that they make."""
        step = max(1, _CAST_ELEMENTS // weight_V_H.shape[1])
        for start in range(0, self.count, step):
            columns = slice(start, min(start + step, self.count))
            yield columns, weight_V_H[columns].float()


class _Chunk:
    """Softmax of one chunk of tokens.

    With x = logits / temperature, log-normaliser z and p = exp(x - z), the entropy is z - sum(p x), its gradient
    -p (x - z + entropy), and that of the target's log-probability is onehot - p.
    """

    def __init__(
        self, hidden_n_H: Tensor, weight_V_H: Tensor, targets_n: Tensor, columns: _Columns, temperature: float,
        *, with_entropy: bool = True,
    ) -> None:  # fmt: skip
        """Two small all-reduces over the group, where it has several ranks."""
        self._columns, self._targets_n, self._temperature = columns, targets_n, temperature
        real = columns.num_real
        x = columns.logits(hidden_n_H, weight_V_H)
        if temperature != 1.0:
            x.div_(temperature)
        x[:, real:] = torch.finfo(torch.float32).min
        column, here = columns.of(targets_n)
        max_n = x.amax(-1)
        columns.reduce(max_n, dist.ReduceOp.MAX)
        # Of exp(x - max), of exp(x - max) · (x - max), and the target's x - max.
        p, sums_3_n = torch.empty_like(x), x.new_empty(3, len(x))
        for rows in _cached_rows(x):
            x_rows = x[rows].sub_(max_n[rows].unsqueeze(-1))
            sums_3_n[2, rows] = x_rows.gather(-1, column[rows]).squeeze(-1).masked_fill(~here[rows], 0.0)
            x_rows[:, real:] = 0.0  # below, no product of it may be infinite; its probability is set apart
            p_rows = torch.exp(x_rows, out=p[rows])
            p_rows[:, real:] = 0.0
            sums_3_n[0, rows] = p_rows.sum(-1)
            sums_3_n[1, rows] = torch.linalg.vecdot(p_rows, x_rows) if with_entropy else math.nan
        columns.reduce(sums_3_n, dist.ReduceOp.SUM)
        log_sum_n = sums_3_n[0].log()
        self._x, self._p, self._sums_3_n, self._log_sum_n = x, p, sums_3_n, log_sum_n
        self.logprobs_n = sums_3_n[2] - log_sum_n
        self.entropy_n = log_sum_n - sums_3_n[1] / sums_3_n[0]

    def grad_logits(self, logprob_grad_n: Tensor, entropy_grad_n: Tensor | None) -> Tensor:
        """Gradient ``[n, V]`` in fp32, in the place of what was kept: this may be asked for once."""
        column, here = self._columns.of(self._targets_n)
        target_grad_n = here * logprob_grad_n
        for rows in _cached_rows(self._p):
            p = self._p[rows].div_(self._sums_3_n[0, rows].unsqueeze(-1))
            if entropy_grad_n is None:
                grad = p.mul_(-logprob_grad_n[rows].unsqueeze(-1))
            else:
                slope = self._x[rows].add_((self.entropy_n - self._log_sum_n)[rows].unsqueeze(-1))
                slope.mul_(entropy_grad_n[rows].unsqueeze(-1)).add_(logprob_grad_n[rows].unsqueeze(-1))
                grad = p.mul_(slope).neg_()
            grad.scatter_add_(-1, column[rows], target_grad_n[rows].unsqueeze(-1))
            if self._temperature != 1.0:
                grad.div_(self._temperature)
        return self._p


def _cached_rows(x_n_V: Tensor) -> Iterator[slice]:
    """Ranges of rows that passes over ``[n, V]`` go through one after another: all at once but on a CPU."""
    step = max(1, _CACHED_ELEMENTS // x_n_V.shape[1]) if x_n_V.device.type == "cpu" else max(1, len(x_n_V))
    for start in range(0, len(x_n_V), step):
        yield slice(start, start + step)


class _Gradients:
    """Of hidden states and weight, filled chunk by chunk; the weight's is summed in fp32."""

    def __init__(self, hidden_N_H: Tensor, weight_V_H: Tensor, columns: _Columns, wanted: tuple[bool, bool]) -> None:
        self._hidden_N_H, self._weight_V_H, self._columns = hidden_N_H, weight_V_H, columns
        self.hidden_N_H = torch.empty_like(hidden_N_H) if wanted[0] else None
        self.weight_V_H = torch.zeros_like(weight_V_H, dtype=torch.float32) if wanted[1] else None

    def add(self, part: slice, grad_n_V: Tensor) -> None:
        if self._columns.fp32:
            self._add_in_fp32(part, grad_n_V)
            return
        grad_n_V = grad_n_V.to(self._weight_V_H.dtype)
        if self.hidden_N_H is not None:
            torch.mm(grad_n_V, self._weight_V_H, out=self.hidden_N_H[part])
        if self.weight_V_H is not None:
            hidden_n_H = self._hidden_N_H[part]
            if self._weight_V_H.dtype == torch.float32:
                self.weight_V_H.addmm_(grad_n_V.t(), hidden_n_H)
            else:
                self.weight_V_H += grad_n_V.t() @ hidden_n_H

    def _add_in_fp32(self, part: slice, grad_n_V: Tensor) -> None:
        wide_n_H = self._hidden_N_H[part].float()
        if self.hidden_N_H is not None:
            sum_n_H = torch.zeros_like(wide_n_H)
            for columns, weight in self._columns.cast(self._weight_V_H):
                sum_n_H.addmm_(grad_n_V[:, columns], weight)
            self.hidden_N_H[part] = sum_n_H
        if self.weight_V_H is not None:
            self.weight_V_H.addmm_(grad_n_V.t(), wide_n_H)


class _Scores(torch.autograd.Function):
    """Log-probs and entropies ``[2, N]``; nothing of a chunk is kept for backward, which makes its logits anew."""

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd functions take positional arguments only
        ctx: Any, hidden_N_H: Tensor, weight_V_H: Tensor, targets_N: Tensor, columns: _Columns, temperature: float
    ) -> Tensor:
        found_2_N = hidden_N_H.new_zeros(2, len(targets_N), dtype=torch.float32)
        for part in columns.chunks(len(targets_N)):
            chunk = _Chunk(hidden_N_H[part], weight_V_H, targets_N[part], columns, temperature)
            found_2_N[:, part] = torch.stack([chunk.logprobs_n, chunk.entropy_n])
        ctx.save_for_backward(hidden_N_H, weight_V_H, targets_N)
        ctx.columns, ctx.temperature = columns, temperature
        return found_2_N

    @staticmethod
    def backward(ctx: Any, grad_2_N: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_N_H, weight_V_H, targets_N = ctx.saved_tensors
        gradients = _Gradients(hidden_N_H, weight_V_H, ctx.columns, ctx.needs_input_grad[:2])
        for part in ctx.columns.chunks(len(targets_N)):
            chunk = _Chunk(hidden_N_H[part], weight_V_H, targets_N[part], ctx.columns, ctx.temperature)
            gradients.add(part, chunk.grad_logits(*grad_2_N[:, part]))
        return gradients.hidden_N_H, gradients.weight_V_H, None, None, None


class _Learn(torch.autograd.Function):
    """A sum of token losses, and the scores ``[2, N]``; backward multiplies what forward found."""

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd functions take positional arguments only
        ctx: Any, hidden_N_H: Tensor, weight_V_H: Tensor, targets_N: Tensor, columns: _Columns, temperature: float,
        with_entropy: bool, loss_of: Callable[[Tensor, Tensor, slice], Tensor], with_gradients: bool, at_once: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wanted = with_gradients and ctx.needs_input_grad[0], with_gradients and ctx.needs_input_grad[1]
        gradients = _Gradients(hidden_N_H, weight_V_H, columns, wanted)
        found_2_N = hidden_N_H.new_zeros(2, len(targets_N), dtype=torch.float32)
        total = hidden_N_H.new_zeros((), dtype=torch.float32)

        def chunk_of(part: slice) -> _Chunk:
            return _Chunk(
                hidden_N_H[part], weight_V_H, targets_N[part], columns, temperature, with_entropy=with_entropy
            )

        def loss_and_grads(found_2_n: Sequence[Tensor], part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
            with torch.enable_grad():
                logprobs_n, entropy_n = (one.detach().requires_grad_() for one in found_2_n)
                loss = loss_of(logprobs_n, entropy_n, part)
            if not any(wanted):
                return loss.detach(), logprobs_n, None
            grads = torch.autograd.grad(loss, (logprobs_n, entropy_n), allow_unused=True)
            return loss.detach(), torch.zeros_like(logprobs_n) if grads[0] is None else grads[0], grads[1]

        parts = list(columns.chunks(len(targets_N)))
        # A loss of whole answers needs the log-probs of all chunks; only where there is one do its logits stay.
        scores_first = at_once and len(parts) != 1
        of_all: tuple[Tensor, Tensor | None] | None = None
        if scores_first:
            for part in parts:
                chunk = chunk_of(part)
                found_2_N[:, part] = torch.stack([chunk.logprobs_n, chunk.entropy_n])
            total, logprob_grad_N, entropy_grad_N = loss_and_grads(list(found_2_N), slice(None))
            of_all = logprob_grad_N, entropy_grad_N
        for part in parts if any(wanted) or not scores_first else []:
            chunk = chunk_of(part)
            if of_all is not None:
                logprob_grad_n, entropy_grad_n = of_all[0][part], None if of_all[1] is None else of_all[1][part]
            else:
                found_2_N[:, part] = torch.stack([chunk.logprobs_n, chunk.entropy_n])
                loss, logprob_grad_n, entropy_grad_n = loss_and_grads([chunk.logprobs_n, chunk.entropy_n], part)
                total += loss
            if any(wanted):
                gradients.add(part, chunk.grad_logits(logprob_grad_n, entropy_grad_n))
        ctx.gradients = gradients
        ctx.mark_non_differentiable(found_2_N)
        return total, found_2_N

    @staticmethod
    def backward(
        ctx: Any, factor: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None, None, None]:
        found: _Gradients = ctx.gradients
        hidden_N_H = None if found.hidden_N_H is None else found.hidden_N_H.mul_(factor)
        weight_V_H = None if found.weight_V_H is None else found.weight_V_H.mul_(factor)
        del ctx.gradients
        return hidden_N_H, weight_V_H, None, None, None, None, None, None, None
