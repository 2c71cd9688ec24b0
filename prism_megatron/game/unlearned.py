"""Why a step taught nobody anything, in words that show what to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from prism_megatron.data.render import Renderer
from prism_megatron.types import PreferenceGroup

ALL_LEFT_OUT = "--correction left out every token of the step"
SCORES_NOT_FINITE = "the discriminator's scores are not finite"
_SHOWN_CHARACTERS = 160


def why_none_is_valid(groups: Sequence[PreferenceGroup], renderer: Renderer) -> str | None:
    """Which rules the answers break, and how one of them reads; None where at least one keeps them all.

    What the model wrote is shown with its control characters escaped.
    """
    answers = [answer for group in groups for answer in group.rollouts]
    problems = Counter(answer.segments.problem for answer in answers)
    if not answers:
        return "there was no answer"
    if None in problems:
        return None
    (commonest, _), *_ = problems.most_common(1)
    example = next(answer for answer in answers if answer.segments.problem == commonest)
    text = renderer.decode(example.token_ids)
    shown = repr(text[:_SHOWN_CHARACTERS]) + ("…" if len(text) > _SHOWN_CHARACTERS else "")
    rules = ", ".join(f"{count} times: {problem}" for problem, count in problems.most_common(3))
    return f"none of {len(answers)} answers keeps the format ({rules}); one of them: {shown}"
