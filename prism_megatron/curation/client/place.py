"""One endpoint as a place for calls: how many it has, when the next may begin, and whether it is well.

Times are seconds of the loop's clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from prism_megatron.config.tools.curate import Endpoint
from prism_megatron.curation.client.limits import Entry, Limits
from prism_megatron.curation.client.pace import Pace
from prism_megatron.endpoints.chat import ChatEndpoint
from prism_megatron.endpoints.outcomes import Answered, ComeAgain, Outcome

_ENOUGH_FAILURES = 3
"""in a row, of whichever calls, after which others of a model's endpoints are preferred"""


@dataclass(eq=False, slots=True)
class Seat:
    """Room for one try of one call, from its taking to its end."""

    place: Place
    counted: tuple[Entry, Entry]
    since: float


class Place:
    """An endpoint. All its methods are called in one event loop."""

    def __init__(self, endpoint: Endpoint, chat: ChatEndpoint, *, pace: Pace) -> None:
        """``chat`` is the endpoint itself."""
        self.endpoint, self.chat, self._pace = endpoint, chat, pace
        self.limits = Limits(
            requests=endpoint.requests_per_minute or math.inf,
            tokens=endpoint.tokens_per_minute or math.inf,
            minute=pace.minute,
        )
        self.under_way = 0
        self.not_reached = 0
        """tries in a row that found no connection"""
        self.problem = ""
        """of the last try that got no answer"""
        self._failures = 0
        self._judged_at = -math.inf
        self.not_before = -math.inf
        """when it may be asked again, as it said, or as it is left alone"""
        self._better_not_before = -math.inf

    @property
    def is_failing(self) -> bool:
        return self._failures >= _ENOUGH_FAILURES or self.not_reached > 0

    def opens(self, tokens: float, *, now: float, has_others: bool) -> float:
        """When a call of about so many tokens may begin, as far as is known; infinity where a call has to end before.

        One that fails is tried by one call at a time, where there are others, or where it cannot be reached.
        """
        careful = self.not_reached > 0 or (self.is_failing and has_others)
        if self.under_way >= (1 if careful else self.endpoint.at_once):
            return math.inf
        soonest = max(self.not_before, now + self.limits.wait(tokens, now=now))
        return max(soonest, self._better_not_before) if has_others else soonest

    def take(self, tokens: float, *, now: float) -> Seat:
        """Begin a call."""
        self.under_way += 1
        return Seat(self, self.limits.begin(tokens, now=now), now)

    def give_back(self, seat: Seat) -> None:
        """The call does not begin after all."""
        self.under_way -= 1
        self.limits.withdraw(seat.counted)

    def end(self, seat: Seat, outcome: Outcome | None, *, now: float) -> None:
        """The call has ended; None where it was given up."""
        self.under_way -= 1
        tokens = None
        if isinstance(outcome, Answered) and outcome.answer_tokens is not None:
            tokens = (outcome.prompt_tokens or 0) + outcome.answer_tokens
        self.limits.end(seat.counted, tokens, now=now)
        if isinstance(outcome, ComeAgain):
            self._fail(outcome, seat, now)
        elif outcome is not None:
            self._failures = self.not_reached = 0

    def _fail(self, outcome: ComeAgain, seat: Seat, now: float) -> None:
        self.problem = outcome.problem
        if outcome.reached:
            self.not_reached = 0
        if outcome.retry_after is not None:
            self.not_before = max(self.not_before, now + outcome.retry_after)
            return
        # Calls that were under way together fail together: that is one failure, and not as many as there were calls.
        if seat.since < self._judged_at:
            return
        self._judged_at = now
        self._failures += 1
        pause = self._pace.pause(self._failures, drawn_by=f"{self.chat.url} {self._failures}")
        if not outcome.reached:
            self.not_reached += 1
            self.not_before = max(self.not_before, now + pause)
        elif self._failures >= _ENOUGH_FAILURES:
            self._better_not_before = now + pause
