"""A reward of one's own: a right answer, and more of it the shorter the reasoning was.

    --reward examples.rewards.short_answers:reward

The function is called in a process of its own, for one rollout at a time, and must return a number. It may check
answers by the project's rules: what takes too long there ends by the same limit as the function.
"""

from __future__ import annotations

from prism_megatron.rewards.check import judge
from prism_megatron.rewards.kinds.latex import same_expression
from prism_megatron.rewards.user import RewardInput
from prism_megatron.rewards.verdict import Ask

LONG_CHARACTERS = 4000
"""From here on a right answer gives half."""


def reward(sample: RewardInput) -> float:
    """1 for a right answer after no reasoning at all, down to 0.5 after long reasoning; 0 for a wrong one."""
    if not judge(Ask(sample.answer, sample.gold, sample.answer_type), same_expression).right:
        return 0.0
    return 1.0 - 0.5 * min(1.0, len(sample.response) / LONG_CHARACTERS)
