"""What became of all problems, from the steps' files alone: figures, and examples of each verdict."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_megatron.config.tools.curate import STEPS, Step
from prism_megatron.curation.files import Row, path_of, rows_of
from prism_megatron.curation.prompts.templates import versions
from prism_megatron.curation.split import ALIGN, SFT

KEPT = "kept"
_BILLION = 10**9


@dataclass
class Findings:
    """What a reader of the files has counted so far."""

    shown: int
    """examples of each verdict"""
    steps: dict[Step, Counter[str]] = field(default_factory=dict)
    """by step: problems kept, and fallen by reason"""
    attempts: dict[str, Counter[int]] = field(default_factory=lambda: {KEPT: Counter(), "fallen": Counter()})
    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """of a role's replies"""
    usage: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """by role: calls, tokens, and billionths of cost, which sum up alike in any order"""
    models: dict[str, str] = field(default_factory=dict)
    sets: Counter[str] = field(default_factory=Counter)
    unaided: int = 0
    scores: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 1.0, 0.0]))
    """by set: sum, least and largest"""
    examples: dict[tuple[Step, str], list[Row]] = field(default_factory=lambda: defaultdict(list))

    def add(self, step: Step, row: Row) -> None:
        """Take note of one row of a step's file."""
        verdict = KEPT if row.kept else row.reason
        self.steps[step][verdict] += 1
        if len(self.examples[step, verdict]) < self.shown:
            self.examples[step, verdict].append(row)
        if step == "split":
            self._add_split(row)
        elif (found := row.found.get(step)) is not None:
            self._add_calls(found.get("calls", ()))
            if step == "answer":
                self.attempts[KEPT if row.kept else "fallen"][found["attempts"]] += 1
                self.unaided += bool(row.kept and found["unaided"])

    def _add_split(self, row: Row) -> None:
        to, score = row.found["split"]["to"], row.found["split"]["score"]
        self.sets[to] += 1
        total, least, largest = self.scores[to]
        self.scores[to] = [total + score, min(least, score), max(largest, score)]

    def _add_calls(self, notes: Sequence[Mapping[str, Any]]) -> None:
        for note in notes:
            usage = self.usage[note["role"]]
            self.models[note["role"]] = note["model"]
            usage["calls"] += 1
            usage["prompt_tokens"] += note["prompt_tokens"]
            usage["answer_tokens"] += note["answer_tokens"]
            usage["billionths"] += round(note["cost"] * _BILLION)
            self.outcomes[note["role"]][note["outcome"]] += 1

    def summary(self) -> dict[str, Any]:
        """For ``summary.json``."""
        return {
            "steps": [
                {
                    "step": step,
                    "problems": counts.total(),
                    "kept": counts[KEPT],
                    "fallen": {why: count for why, count in _by_count(counts) if why != KEPT},
                }
                for step, counts in self.steps.items()
            ],
            "sets": {
                name: {"records": self.sets[name], "mean_score": self.scores[name][0] / self.sets[name],
                       "least_score": self.scores[name][1], "largest_score": self.scores[name][2]}
                for name in (SFT, ALIGN) if self.sets[name]
            },
            "teacher_replies": {name: dict(sorted(counts.items())) for name, counts in self.attempts.items()},
            "kept_unaided": self.unaided,
            "outcomes": {role: dict(_by_count(counts)) for role, counts in sorted(self.outcomes.items())},
            "usage": {role: self._usage(role) for role in sorted(self.usage)},
            "cost": sum(usage["billionths"] for usage in self.usage.values()) / _BILLION,
            "prompts": dict(versions()),
        }  # fmt: skip

    def _usage(self, role: str) -> dict[str, Any]:
        usage = self.usage[role]
        return {
            "model": self.models[role],
            "calls": usage["calls"],
            "prompt_tokens": usage["prompt_tokens"],
            "answer_tokens": usage["answer_tokens"],
            "cost": usage["billionths"] / _BILLION,
        }


def findings_of(folder: Path, *, shown: int) -> Findings:
    """From the files of those steps that are done. Raises DataError for a damaged one."""
    findings = Findings(shown)
    for step in _done(folder):
        findings.steps[step] = Counter()
        for row in rows_of(path_of(folder, step)):
            findings.add(step, row)
    return findings


def lines_of(summary: Mapping[str, Any]) -> list[str]:
    """The figures for a terminal."""
    lines = [
        f"{one['step']:<13} {one['kept']:>8,} of {one['problems']:>8,} kept"
        + "".join(f"; {count:,} {why}" for why, count in one["fallen"].items())
        for one in summary["steps"]
    ]
    for role, usage in summary["usage"].items():
        lines.append(
            f"{role:<13} {usage['calls']:>8,} answers of {usage['model']}: {usage['prompt_tokens']:,} + "
            f"{usage['answer_tokens']:,} tokens, cost {usage['cost']:.4f}"
        )
    for name, one in summary["sets"].items():
        lines.append(f"{name:<13} {one['records']:>8,} records, mean score {one['mean_score']:.3f}")
    return lines


def _done(folder: Path) -> Iterator[Step]:
    yield from (step for step in STEPS if step != "write" and path_of(folder, step).is_file())


def _by_count(counts: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent first, equals by their names."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
