"""The endpoints of one model: which of them takes the next call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from prism_megatron.curation.client.gate import Gate
from prism_megatron.curation.client.place import Place, Seat
from prism_megatron.errors import EndpointError


class Pool:
    """Places for the calls of one role, which are served in the order in which they come."""

    def __init__(
        self,
        role: str,
        places: Sequence[Place],
        gate: Gate,
        *,
        tries: int,
        longest_wait: float,
        clock: Callable[[], float],
    ) -> None:
        """Where all endpoints are out of reach ``tries`` times in a row, or want to be left alone for more than
        ``longest_wait`` seconds, the curation ends."""
        self.role, self.places = role, places
        self._gate, self._tries, self._longest_wait, self._clock = gate, tries, longest_wait, clock
        self._turn = asyncio.Lock()
        self._credit = [0.0] * len(places)

    async def take(self, tokens: float) -> Seat:
        """Room for one try of a call of about so many tokens, as soon as there is some.

        Raises EndpointError where no endpoint can be reached, and what the gate was shut for.
        """
        async with self._turn:
            while True:
                now = self._clock()
                self._check(now)
                opens = [place.opens(tokens, now=now, has_others=self._has_others(place)) for place in self.places]
                if min(opens) <= now:
                    return self._next([time <= now for time in opens]).take(tokens, now=now)
                await self._gate.changed(min(opens) - now)

    def _has_others(self, place: Place) -> bool:
        return any(not other.is_failing for other in self.places if other is not place)

    def _next(self, is_open: Sequence[bool]) -> Place:
        """Of those that are open, by turns as their weights say: each gains its weight, and who has most is chosen and
        pays what all have gained, so that none waits long and none is asked twice running where others could be."""
        weights = [place.endpoint.weight if may else 0.0 for place, may in zip(self.places, is_open, strict=True)]
        self._credit = [credit + weight for credit, weight in zip(self._credit, weights, strict=True)]
        chosen = max((index for index, may in enumerate(is_open) if may), key=lambda index: self._credit[index])
        self._credit[chosen] -= sum(weights)
        return self.places[chosen]

    def _check(self, now: float) -> None:
        self._gate.check()
        if all(place.not_reached >= self._tries for place in self.places):
            what, remedy = "no endpoint can be reached", "see that it runs, and that its address is right"
        elif (wait := min(place.not_before for place in self.places) - now) > self._longest_wait:
            what, remedy = f"all endpoints ask to come again in {wait:.0f} s", "wait so long"
        else:
            return
        last = "; ".join(f"{place.chat.url}: {place.problem}" for place in self.places)
        error = EndpointError(f"{self.role}: {what} ({last}); {remedy}, and the same command goes on")
        self._gate.shut(error)
        raise error
