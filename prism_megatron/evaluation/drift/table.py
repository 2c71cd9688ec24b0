"""Distances as lines of text and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prism_megatron.evaluation.drift.compare import MIN_TEXTS, Measured
from prism_megatron.evaluation.drift.responses import Responses

NAMES = {
    "wasserstein": "Wasserstein-1",
    "jensen_shannon": "Jensen-Shannon",
    "mmd2": "MMD²",
    "mmd2_same_length": "MMD², same length",
}


def lines_of(first: Responses, second: Responses, found: Sequence[Measured]) -> list[str]:
    """A heading, a line a distance, and what is not measured. ``by chance`` is the mean over relabellings."""
    lines = [
        f"{first.name} ({_count(first)}) against {second.name} ({_count(second)})",
        f"  {'':<16} {'distance':<18} {'texts':>13} {'words or count':>17} {'value':>9} {'by chance':>9} {'p':>7}",
    ]
    for one in found:
        texts = f"{one.num_first} pairs" if one.pairs else f"{one.num_first} : {one.num_second}"
        means = f"{_mean(one.first_mean)} : {_mean(one.second_mean)}"
        figures = f"fewer than {MIN_TEXTS} texts"
        if one.distance is not None:
            value, expected, p = one.distance
            figures = f"{value:>9.5f} {expected:>9.5f} {p:>7.4f}"
        lines.append(f"  {one.what:<16} {NAMES[one.kind]:<18} {texts:>13} {means:>17} {figures}")
    return lines


def plain(first: Responses, second: Responses, found: Sequence[Measured]) -> dict[str, Any]:
    """The same under names that a program reads: ``distances[what][kind]``."""
    distances: dict[str, dict[str, Any]] = {}
    for one in found:
        figures = None if one.distance is None else one.distance._asdict()
        distances.setdefault(one.what, {})[one.kind] = {
            "texts": [one.num_first, one.num_second],
            "pairs": one.pairs,
            "means": [one.first_mean, one.second_mean],
            "distance": figures,
        }
    counts = {
        side: {"responses": len(of.texts), "not_in_form": of.not_in_form, "lines_left_out": of.left_out}
        for side, of in (("first", first), ("second", second))
    }
    return {**counts, "distances": distances}


def _count(responses: Responses) -> str:
    return f"{len(responses.texts)} responses, {responses.not_in_form} not in form, {responses.left_out} lines left out"


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
