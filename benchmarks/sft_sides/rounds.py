"""How a side is driven: it trains so many steps, says what each took, and waits to be told to go on.

Imported by all sides, in whichever environment they run; the standard library and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepTaken:
    """One optimizer step: seconds, mean loss of a label token, and what was read."""

    wall: float
    cpu: float
    loss: float
    tokens: int
    """real ones, images' included"""
    labels: int
    ids: int
    """sum of the real tokens' ids"""
    prompt_tokens: int = 0
    """of all prompts, where a side answers them"""
    parts: Mapping[str, float] = field(default_factory=dict)
    """seconds of what the step is made of, where a side says it"""


class Rounds:
    """A side's end of the pipe. What libraries print goes to stderr, so that stdout holds the answers alone."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        self._steps: list[StepTaken] = []
        self._left = 0

    def begin(self) -> None:
        """Say that everything is loaded, and wait for the first round."""
        self._answer([])

    def took(
        self,
        loss: float,
        *,
        tokens: int,
        labels: int,
        ids: int,
        prompt_tokens: int = 0,
        parts: Mapping[str, float] | None = None,
    ) -> None:
        """A step has ended. Waits where it was the round's last."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._steps.append(StepTaken(wall, cpu, loss, tokens, labels, ids, prompt_tokens, parts or {}))
        self._left -= 1
        if self._left == 0:
            self._answer(self._steps)
            self._steps = []
        self._mark()

    def _answer(self, steps: list[StepTaken]) -> None:
        self._answers.write(json.dumps([asdict(step) for step in steps]) + "\n")
        self._answers.flush()
        line = sys.stdin.readline()
        if not line.strip():
            os._exit(0)  # the other end is done; nothing here is worth a shutdown
        self._left = int(line)
        self._mark()

    def _mark(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()


def all_rows(work: Path) -> list[dict[str, Any]]:
    """The records in their own order."""
    with (work / "records" / "records.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def ordered_rows(work: Path) -> list[dict[str, Any]]:
    """The records in the order in which every side trains on them, each time that they come."""
    rows = {row["id"]: row for row in all_rows(work)}
    order: list[str] = json.loads((work / "order.json").read_text(encoding="utf-8"))
    return [rows[identity] for identity in order]
