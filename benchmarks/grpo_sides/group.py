"""What both sides of ``benchmarks/grpo.py`` have in common. The standard library and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

PROMPTS, SAMPLES, NEW_TOKENS = 4, 16, 64
LR = 1e-6
MICRO_BATCH = {"tiny": 64, "31M": 16}
"""Answers that TRL has in one pass: what suits it best."""


def checksum(text: str) -> float:
    """A reward that costs nothing, differs from answer to answer and is the same for equal ones."""
    return float(sum(text.encode("utf-8", errors="replace")) % 97) / 97.0


def prompts_of(step: int, count: int) -> Sequence[int]:
    """Numbers of the records whose prompts are answered in a step."""
    return [(step * PROMPTS + place) % count for place in range(PROMPTS)]
