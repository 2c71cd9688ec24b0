"""The outcome of one check, and how a check says that it goes no further."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

GUARDED = "guarded: "
"""How the reason begins of an answer that a static guard refused."""
KILLED = "killed: "
"""How the reason begins of a check that was ended from outside."""


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right.

    Example: ``Verdict(right=False, kind="latex", seconds=1.0, reason="killed: 1 s of CPU time")``.
    """

    right: bool
    kind: str
    """what the gold is: letters, truth, number, tuple, interval, set, ratio, time, list, latex or text"""
    seconds: float = 0.0
    """that the check took"""
    reason: str = ""
    """why nothing was compared: it begins with ``guarded: `` or ``killed: ``; empty where a comparison decided"""

    @property
    def guarded(self) -> bool:
        return self.reason.startswith(GUARDED)

    @property
    def killed(self) -> bool:
        return self.reason.startswith(KILLED)


class Ask(NamedTuple):
    """One answer to check against what is right."""

    answer: str
    gold: str
    answer_type: str | None = None
    """choice, integer, float, text or bool where a record says it"""


class GuardedError(Exception):
    """An answer that must not be looked at any further; its text says why."""


class NeedsAlgebraError(Exception):
    """Only sympy can tell, and it may be asked in a worker alone."""
