"""What one process has asked, and what came of it."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field, replace

from prism_megatron.curation.calls import Response
from prism_megatron.endpoints.outcomes import Answered, ComeAgain, Outcome, Oversized, Refused


@dataclass
class Counts:
    """Of calls and tries."""

    calls: int = 0
    """that were asked for"""
    stored: int = 0
    """of these, that had a response in the store"""
    waited_for: int = 0
    """of these, that another process asked meanwhile"""
    tries: Counter[str] = field(default_factory=Counter)
    """of requests, by what came of them: answered, come_again, not_reached, refused, oversized, refuses_all"""
    responses: Counter[str] = field(default_factory=Counter)
    """that came of these, by their kind"""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cost: float = 0.0


class Tally:
    """Counts that threads add to."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._lock = threading.Lock()
        self._counts = Counts()

    def now(self) -> Counts:
        """A copy."""
        with self._lock:
            return replace(self._counts, tries=Counter(self._counts.tries), responses=Counter(self._counts.responses))

    def called(self, *, stored: bool = False) -> None:
        """A call was asked for; ``stored``: and its response is there."""
        with self._lock:
            self._counts.calls += 1
            self._counts.stored += stored

    def waited_for(self) -> None:
        """Another process asked the call."""
        with self._lock:
            self._counts.waited_for += 1

    def tried(self, outcome: Outcome) -> None:
        """One try has ended."""
        with self._lock:
            self._counts.tries[_name_of(outcome)] += 1

    def responded(self, response: Response) -> None:
        """A call has ended, and its response is stored."""
        with self._lock:
            self._counts.responses[response.kind] += 1
            self._counts.prompt_tokens += response.prompt_tokens
            self._counts.answer_tokens += response.answer_tokens
            self._counts.cost += response.cost


def _name_of(outcome: Outcome) -> str:
    if isinstance(outcome, ComeAgain):
        return "come_again" if outcome.reached else "not_reached"
    if isinstance(outcome, Answered):
        return "answered"
    if isinstance(outcome, Refused):
        return "refused"
    return "oversized" if isinstance(outcome, Oversized) else "refuses_all"
