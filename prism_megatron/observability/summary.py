"""``summary.json``: what a run came to, computed from its rows, so that a resumed run sums up all of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_megatron.disk import write_atomically
from prism_megatron.observability.catalogue import describe
from prism_megatron.observability.metrics import Row, to_json

SECONDS_PREFIX = "seconds/"
_WINDOW = 10


@dataclass(frozen=True)
class RunFacts:
    """What the rows do not know."""

    world_size: int | None
    """None where nobody knows any more, as with versions"""
    layout: Mapping[str, int]
    """sizes of tp, pp, cp, dp and ep"""
    hf_export: str | None
    """folder of the exported policy"""
    checkpoint: str | None
    """folder of the last checkpoint"""
    megatron_core: str | None
    """version"""
    torch: str | None
    """version"""
    other_seconds: Mapping[str, float]
    """seconds by phase outside the steps of this process, such as start-up and saving"""
    data: Mapping[str, int] = field(default_factory=dict)
    """lines of the data, how many are kept, and how many are left out for each reason; empty where all is made"""


def summarise(rows: Sequence[Row], facts: RunFacts) -> dict[str, Any]:
    """What the summary of any stage has; a stage adds its own figures.

    ``steps`` counts from the very first step, also where the rows begin at a later one (a run that went on in a new
    folder).
    """
    tokens = sum(trained_tokens(row) or 0.0 for row in rows)
    in_steps = _seconds_by_phase(rows)
    outside = facts.other_seconds
    seconds = {phase: outside.get(phase, 0.0) + in_steps.get(phase, 0.0) for phase in {**outside, **in_steps}}
    seconds_of_steps = sum(in_steps.values())
    return {
        "steps": int(number(rows[-1], "step") or 0) + 1 if rows else 0,
        "world_size": facts.world_size,
        "layout": dict(facts.layout),
        "data": dict(facts.data),
        "window_steps": len(window(rows)),
        "tokens_per_second": tokens / seconds_of_steps if seconds_of_steps else None,
        "seconds_by_phase": seconds,
        "hf_export": facts.hf_export,
        "checkpoint": facts.checkpoint,
        "megatron_core": facts.megatron_core,
        "torch": facts.torch,
    }


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write indented JSON in one rename."""
    write_atomically(path, to_json(summary, indent=2) + "\n")


def window(rows: Sequence[Row]) -> Sequence[Row]:
    """The last ten steps, which shares and gaps are pooled over."""
    return rows[-_WINDOW:]


def number(row: Row, key: str) -> float | None:
    """The metric, or None where the row has none or it is not a number."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else None


def step_seconds(row: Row) -> float | None:
    """Seconds of all phases of a step, or None where none was timed."""
    seconds = [number(row, key) or 0.0 for key in row if key.startswith(SECONDS_PREFIX)]
    return sum(seconds) if seconds else None


def pooled(rows: Sequence[Row], key: str) -> float | None:
    """Mean of a figure, weighted by its count as the catalogue names it; None where no row has both.

    Raises UnknownMetricError for a figure without an entry, ValueError for one without a count.
    """
    count_key = describe(key).counted_by
    if count_key is None:
        raise ValueError(f"{key} has no count in observability/catalogue.py, so that its steps cannot be pooled")
    pairs = [(number(row, key), number(row, count_key)) for row in rows]
    known = [(value, count) for value, count in pairs if value is not None and count]
    weight = sum(count for _, count in known)
    return sum(value * count for value, count in known) / weight if weight else None


def trained_tokens(row: Row) -> float | None:
    """What speed is told in: tokens of answers, or of demonstrations."""
    tokens = number(row, "response_tokens")
    return number(row, "tokens") if tokens is None else tokens


def total(rows: Sequence[Row], key: str) -> int:
    """Sum of a count over rows; rows without it count 0."""
    return int(sum(number(row, key) or 0.0 for row in rows))


def largest(rows: Sequence[Row], key: str) -> float | None:
    """The largest value of a figure, or None where no row has it."""
    return max((value for row in rows if (value := number(row, key)) is not None), default=None)


def _seconds_by_phase(rows: Sequence[Row]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for row in rows:
        for key in row:
            if key.startswith(SECONDS_PREFIX):
                phase = key.removeprefix(SECONDS_PREFIX)
                seconds[phase] = seconds.get(phase, 0.0) + (number(row, key) or 0.0)
    return seconds
