"""What a policy learns from: rollouts, and what every one of their tokens is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_megatron.types import Prompt, Rollout


@dataclass(frozen=True)
class ExperienceRow:
    """One rollout of a prompt with an advantage for each of its tokens.

    Example: ``ExperienceRow(prompt, rollout, advantages=[0.5] * len(rollout.token_ids))``.
    """

    prompt: Prompt
    rollout: Rollout
    advantages: Sequence[float]


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
