"""Which prompts are kept, and how pass rates lie."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_megatron.data.records import Record
from prism_megatron.data.scenes import Scene
from prism_megatron.data.selection import digest_of
from prism_megatron.disk import write_atomically, writing
from prism_megatron.stages.select_prompts.pass_rates import PassRate

SELECTED, SUMMARY = "selected.jsonl", "summary.json"
_BAR = 40


@dataclass(frozen=True)
class Keep:
    """Pass rates from ``low`` to ``high``, both included."""

    low: float
    high: float

    def takes(self, share: float) -> bool:
        """Whether a prompt with this pass rate is kept."""
        return self.low <= share <= self.high


def histogram_of(rates: Sequence[PassRate], rollouts: int, keep: Keep) -> list[dict[str, Any]]:
    """By number of right answers, from 0 to all ``rollouts``: how many prompts have it, and whether they are kept."""
    prompts = [0] * (rollouts + 1)
    for rate in rates:
        prompts[rate.passes] += 1
    return [
        {"passes": passes, "prompts": count, "kept": keep.takes(passes / rollouts)}
        for passes, count in enumerate(prompts)
    ]


def summary_of(rates: Sequence[PassRate], rollouts: int, keep: Keep, data_counts: Mapping[str, int]) -> dict[str, Any]:
    """All figures of the result. Nothing in it depends on when, or in how many tries, it was made."""
    answers = sum(rate.rollouts for rate in rates)
    return {
        "prompts": len(rates),
        "selected": sum(keep.takes(rate.share) for rate in rates),
        "keep_from": keep.low,
        "keep_to": keep.high,
        "rollouts_per_prompt": rollouts,
        "accuracy": sum(rate.passes for rate in rates) / answers,
        "valid_share": sum(rate.format for rate in rates) / answers,
        "tokens_per_answer": sum(rate.tokens for rate in rates) / answers,
        "histogram": histogram_of(rates, rollouts, keep),
        "data": dict(data_counts),
    }


def table_of(summary: Mapping[str, Any]) -> list[str]:
    """The histogram as lines of text; a bar of ``#`` is of prompts that are kept, one of ``.`` of the others."""
    most = max(row["prompts"] for row in summary["histogram"])
    lines = [f"{'right':>9} {'prompts':>8}"]
    for row in summary["histogram"]:
        bar = ("#" if row["kept"] else ".") * -(-_BAR * row["prompts"] // most)
        lines.append(f"{row['passes']:>4} of {summary['rollouts_per_prompt']:<3}{row['prompts']:>6} {bar}".rstrip())
    lines.append(
        f"{summary['selected']} of {summary['prompts']} prompts have a pass rate from {summary['keep_from']:g} to "
        f"{summary['keep_to']:g}; of all answers {summary['accuracy']:.3f} are right and "
        f"{summary['valid_share']:.3f} in the asked form"
    )
    return lines


def write_choice(
    folder: Path,
    rates: Sequence[PassRate],
    asked: Sequence[Record | Scene],
    keep: Keep,
    summary: Mapping[str, Any],
) -> None:
    """Write both files of the result whole; ``asked`` are the records or scenes of ``rates``. Raises DiskError."""
    lines = [
        {"id": rate.id, "pass_rate": rate.share, "passes": rate.passes, "rollouts": rate.rollouts,
         "digest": digest_of(one)}
        for rate, one in zip(rates, asked, strict=True) if keep.takes(rate.share)
    ]  # fmt: skip
    with writing(folder / SELECTED):
        write_atomically(folder / SELECTED, "".join(f"{json.dumps(line)}\n" for line in lines))
    with writing(folder / SUMMARY):
        write_atomically(folder / SUMMARY, f"{json.dumps(summary, indent=1)}\n")
