"""How much may begin in a minute: requests, and tokens.

In no 60 seconds does more begin than the limit, tries that are made again among it. Times are seconds of any clock that
does not go back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

MINUTE_SECONDS = 60.0
ON_THE_WAY_SECONDS = 2.0
"""An endpoint counts a request when it arrives, some time after it began here. The minute of a request is taken to
begin when its answer comes, and after so long at the latest."""


@dataclass(eq=False, slots=True)
class Entry:
    """What has begun, and counts until it leaves."""

    amount: float
    leaves: float
    has_left: bool = False


class Window:
    """The last minute of one endpoint."""

    def __init__(self, limit: float, *, minute: float = MINUTE_SECONDS) -> None:
        """``limit`` is of what may begin in ``minute`` seconds."""
        self.limit, self._minute = limit, minute
        self._entries: deque[Entry] = deque()
        self._total = 0.0

    def wait(self, amount: float, *, now: float) -> float:
        """Seconds until ``amount`` more may begin; what is more than the limit waits until nothing else counts."""
        self._leave(now)
        if self._total + amount <= self.limit or not self._entries:
            return 0.0
        left, until = self._total, now
        for entry in self._entries:
            left, until = left - entry.amount, max(until, entry.leaves)
            if left + amount <= self.limit:
                break
        return until - now

    def begin(self, amount: float, *, now: float) -> Entry:
        """``amount`` begins."""
        entry = Entry(amount, now + ON_THE_WAY_SECONDS + self._minute)
        self._entries.append(entry)
        self._total += amount
        return entry

    def end(self, entry: Entry, amount: float, *, now: float) -> None:
        """What began has ended, and was ``amount``."""
        entry.leaves = min(entry.leaves, now + self._minute)
        self._correct(entry, amount)

    def withdraw(self, entry: Entry) -> None:
        """What was about to begin does not."""
        entry.leaves = 0.0
        self._correct(entry, 0.0)

    def _correct(self, entry: Entry, amount: float) -> None:
        # What has left already, after a call that took longer than a minute, is in the total no more.
        if not entry.has_left:
            self._total += amount - entry.amount
        entry.amount = amount

    def _leave(self, now: float) -> None:
        # In the order in which they began: one may count for a moment longer than it must, and none for less.
        while self._entries and self._entries[0].leaves <= now:
            entry = self._entries.popleft()
            entry.has_left = True
            self._total -= entry.amount


class Limits:
    """Those of one endpoint."""

    def __init__(self, *, requests: float, tokens: float, minute: float = MINUTE_SECONDS) -> None:
        """``requests`` and ``tokens`` of any ``minute`` seconds; infinity for no limit."""
        self._requests, self._tokens = Window(requests, minute=minute), Window(tokens, minute=minute)

    def wait(self, tokens: float, *, now: float) -> float:
        """Seconds until a request of about so many tokens may begin."""
        return max(self._requests.wait(1, now=now), self._tokens.wait(tokens, now=now))

    def begin(self, tokens: float, *, now: float) -> tuple[Entry, Entry]:
        """A request of about so many tokens begins; what it counts as is to be ended or withdrawn."""
        return self._requests.begin(1, now=now), self._tokens.begin(tokens, now=now)

    def end(self, begun: tuple[Entry, Entry], tokens: float | None, *, now: float) -> None:
        """A request has ended; ``tokens`` is what it took, None where nobody knows."""
        request, told = begun
        self._requests.end(request, 1, now=now)
        self._tokens.end(told, told.amount if tokens is None else tokens, now=now)

    def withdraw(self, begun: tuple[Entry, Entry]) -> None:
        """A request does not begin after all."""
        request, told = begun
        self._requests.withdraw(request)
        self._tokens.withdraw(told)
