"""What a policy learns from: rollouts, and what every one of their tokens is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from prism_megatron.types import Prompt, Rollout


@dataclass(frozen=True)
class ExperienceRow:
    """One rollout of a prompt with an advantage for each of its tokens.

    Example: ``ExperienceRow(prompt, rollout, advantages=[0.5] * len(rollout.token_ids))``.
    """

    prompt: Prompt
    rollout: Rollout
    advantages: Sequence[float]
    old_logprobs: Sequence[float] | None = None
    """of each token, under the policy before the first update on it; None: those of the update itself"""
    reference_logprobs: Sequence[float] | None = None
    """of each token, under the frozen policy that this one is held near to"""
    weights: Sequence[float] | None = None
    """importance weight of each token; 0 leaves it out, of every mean too"""

    @property
    def kept_tokens(self) -> int:
        """Tokens that are learned from."""
        length = len(self.rollout.token_ids)
        return length if self.weights is None else sum(weight > 0 for weight in self.weights)


@dataclass(frozen=True)
class Experience:
    """All rows of one step, on every rank, and the ``version`` of the policy that trains on them.

    Example: ``Experience(rows, version=7)``; rows drawn by version 6 of the policy are off-policy then.
    """

    rows: Sequence[ExperienceRow]
    version: int
    rewarded: bool = True
    """whether any row's advantages say anything; a policy is not updated for none"""

    @property
    def response_tokens(self) -> int:
        """Tokens of all rollouts: the denominator of a token mean."""
        return sum(len(row.rollout.token_ids) for row in self.rows)

    @property
    def kept_tokens(self) -> int:
        """The same without those that a correction leaves out."""
        return sum(row.kept_tokens for row in self.rows)

    @property
    def kept_rows(self) -> int:
        """Rollouts with a token that is learned from: the denominator of a mean over answers."""
        return sum(row.kept_tokens > 0 for row in self.rows)

    def parts(self, count: int) -> list[Experience]:
        """The rows in ``count`` mini-batches, in their order, which differ by one row at most.

        Raises ValueError where there are too few rows for that.
        """
        if count == 1:
            return [self]
        if len(self.rows) < count:
            raise ValueError(f"{len(self.rows)} rollouts cannot be {count} mini-batches")
        cuts = [part * len(self.rows) // count for part in range(count + 1)]
        return [replace(self, rows=self.rows[start:end]) for start, end in pairwise(cuts)]
