"""Sums over whole answers of values that are known token by token, wherever the tokens lie.

A micro-batch may hold several answers in one row (packed), and context-parallel ranks hold parts of each.
Shape suffixes: n response tokens of this rank, R answers of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def _alone(sums_R: Tensor) -> Tensor:
    return sums_R


@dataclass(frozen=True, eq=False)
class Rows:
    """Which answer each token belongs to.

    ``over_ranks`` adds sums over the ranks that hold the answers' other tokens, gradients included. Example: tokens 0
    and 1 of answer 0 and one of answer 1, of which nothing is left out: ``Rows(row_n=tensor([0, 0, 1]),
    kept_n=tensor([True, True, True]), tokens_R=tensor([2.0, 1.0]))``.
    """

    row_n: Tensor
    kept_n: Tensor
    """False for tokens that a correction leaves out"""
    tokens_R: Tensor
    """kept tokens of each answer, on all ranks"""
    over_ranks: Callable[[Tensor], Tensor] = _alone

    def sums(self, values_n: Tensor) -> Tensor:
        """``[R]`` in float64: sum over an answer's kept tokens, those of other ranks too; differentiable."""
        kept_n = values_n.masked_fill(~self.kept_n, 0.0).double()
        sums_R = kept_n.new_zeros(len(self.tokens_R)).index_add(0, self.row_n, kept_n)
        return self.over_ranks(sums_R)

    def means(self, values_n: Tensor) -> Tensor:
        """``[n]``: for every token the mean over its answer's kept tokens, in the dtype of the values."""
        means_R = self.sums(values_n) / self.tokens_R.double().clamp(min=1.0)
        return means_R[self.row_n].to(values_n.dtype)

    def tokens(self) -> Tensor:
        """``[n]``: for every token how many its answer has, at least 1."""
        return self.tokens_R.clamp(min=1.0)[self.row_n]
