"""How far the form of responses has drifted from the supervision: caption items, reasoning steps, tokens.

PRISM (arXiv 2604.28123) compares the densities of caption items and reasoning steps of base, supervision and trained
policies, and publishes no counting rule and no distance. The rules below and the distance are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prism_megatron.data.segments import parse_response

PROXIES = ("caption_items", "reasoning_steps", "tokens")

_BULLET = re.compile(r"\s*[-*+•‣·–]\s+\S")
_NUMBERED = re.compile(r"\s*(?:\d{1,3}[.):]\s+\S|(?:#{1,6}\s*|\*{1,2}\s*)?step\s+\d{1,3}\b)", re.IGNORECASE)
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class ResponseForm:
    """Counts of one valid response. ``tokens`` are those of the whole response, its end token included."""

    caption_items: int
    reasoning_steps: int
    tokens: int


def count_items(caption: str) -> int:
    """Lines of a caption that open with a bullet."""
    return sum(_BULLET.match(line) is not None for line in caption.splitlines())


def count_steps(reasoning: str) -> int:
    """Numbered lines and lines that open with "Step k"; without any, paragraphs.

    Paragraphs are parted by blank lines; a text without blank lines has one to a line.
    """
    numbered = sum(_NUMBERED.match(line) is not None for line in reasoning.splitlines())
    if numbered:
        return numbered
    parts = _BLANK_LINES.split(reasoning.strip())
    if len(parts) == 1:
        parts = reasoning.splitlines()
    return sum(bool(part.strip()) for part in parts)


def response_form(text: str, *, tokens: int) -> ResponseForm | None:
    """Counts of a response given without its end token; None where its format is not valid."""
    parsed = parse_response(text.encode("utf-8", errors="replace"))
    if isinstance(parsed, str):
        return None
    return ResponseForm(count_items(parsed.caption), count_steps(parsed.think), tokens)


def wasserstein_1(values: Sequence[float], reference: Sequence[float]) -> float:
    """Distance of two empirical distributions: the area between their distribution functions.

    Vaserstein 1969; ``scipy.stats.wasserstein_distance`` computes the same. Raises ValueError for an empty one.
    """
    a, b = np.sort(np.asarray(values, dtype=np.float64)), np.sort(np.asarray(reference, dtype=np.float64))
    if not a.size or not b.size:
        raise ValueError("the distance needs at least one value on each side")
    points = np.sort(np.concatenate([a, b]))
    below_a = np.searchsorted(a, points[:-1], side="right") / a.size
    below_b = np.searchsorted(b, points[:-1], side="right") / b.size
    return float(np.abs(below_a - below_b) @ np.diff(points))
