"""How far the form of a policy's greedy answers is from that of the base's, question by question."""

from __future__ import annotations

from pathlib import Path

from prism_megatron.evaluation.benchmark.answers import ANSWERS
from prism_megatron.evaluation.drift.compare import Plan, compare
from prism_megatron.evaluation.drift.responses import read_responses

MEASURED = ("caption_items", "reasoning_steps")
"""What is counted; ``prism-drift`` on the same folders measures words too."""
_PLAN = Plan(permutations=99)


def drift_from(base: Path, evaluation: Path) -> dict[str, float | None]:
    """Wasserstein-1 distances of both counts; None where too few answers are in the asked form.

    Raises DataError for a damaged file of answers.
    """
    own, other = (read_responses(folder.name, folder / ANSWERS, mode="greedy") for folder in (evaluation, base))
    found = {one.what: one.distance for one in compare(own, other, None, _PLAN) if one.kind == "wasserstein"}
    return {name: None if (distance := found[name]) is None else round(distance.value, 6) for name in MEASURED}
