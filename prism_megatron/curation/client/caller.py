"""Answers calls: from the store where it has the response, and from endpoints where it has not.

Everything that decides about tries happens in one event loop, which has a thread of its own. Limits are of one process:
two processes that share a store have twice as many requests a minute.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future

from prism_megatron.config.tools.curate import Model
from prism_megatron.curation.calls import Call, Response
from prism_megatron.curation.client.counts import Counts, Tally
from prism_megatron.curation.client.gate import Gate
from prism_megatron.curation.client.pace import Pace
from prism_megatron.curation.client.place import Seat
from prism_megatron.curation.client.prices import Tokens, estimate
from prism_megatron.curation.client.responses import response_to
from prism_megatron.curation.client.roles import Role, build_roles
from prism_megatron.curation.storage.store import Claim, Store
from prism_megatron.endpoints.chat import LIMIT_BYTES, refuses_all_because
from prism_megatron.endpoints.loop import LoopThread
from prism_megatron.endpoints.outcomes import ComeAgain, Outcome, RefusesAll
from prism_megatron.errors import ConfigError, DiskError, SpentError, StoreError


class Caller:
    """An ``Asker`` over a store and the endpoints of several models. Threads may share it.

    Every call that is under way is held in memory, with its images: ask for some more than ``at_once`` of them, and for
    another whenever one has ended.
    """

    def __init__(
        self,
        store: Store,
        models: Mapping[str, Model],
        *,
        seed: int,
        max_cost: float | None = None,
        environment: Mapping[str, str] = os.environ,
        pace: Pace | None = None,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        """``models`` by the roles of calls; ``seed`` draws how long is waited; ``max_cost`` bounds what all responses
        in the store cost; ``limit_bytes`` is read of an answer. ``store`` is its owner's to close, after this.

        Raises ConfigError where a model has no endpoint, an address is none, or a key is missing.
        """
        self._store, self._seed, self._max_cost, self._pace = store, seed, max_cost, pace or Pace()
        self._gate = Gate()
        self._roles = build_roles(
            models, environment, self._gate, pace=self._pace, limit_bytes=limit_bytes, clock=time.monotonic
        )
        self._places = list({id(place): place for role in self._roles.values() for place in role.pool.places}.values())
        self._tally = Tally()
        self._lock = threading.Lock()
        self._waiting: dict[str, Future[Response]] = {}
        self._under_way = 0
        self._loop = LoopThread("calls of endpoints")

    @property
    def at_once(self) -> int:
        """How many calls all endpoints together may have under way."""
        return sum(place.endpoint.at_once for place in self._places)

    @property
    def counts(self) -> Counts:
        """What was asked up to now."""
        return self._tally.now()

    def ask(self, call: Call) -> Future[Response]:
        """Begin; two calls with one key are one. A response that is given is stored.

        The future raises ConfigError where an endpoint refuses whatever it is asked, EndpointError where none can be
        reached, SpentError once ``max_cost`` is reached, StoreError and DiskError where nothing can be stored, and
        CancelledError where this is closed before. Raises StoreError, DiskError where the store cannot be read.
        """
        role, key = self._roles[call.role], call.key
        known = self._store.get(key)
        self._tally.called(stored=known is not None)
        if known is not None:
            done: Future[Response] = Future()
            done.set_result(known)
            return done
        with self._lock:
            if (same := self._waiting.get(key)) is not None:
                return same
            future = self._waiting[key] = self._loop.start(self._answer(role, call, key))
        # Outside of the lock: where the call has ended already, this runs at once.
        future.add_done_callback(lambda ended: self._forget(key, ended))
        return future

    def close(self) -> None:
        """End all calls, also those under way, and leave no thread and no connection."""
        self._loop.close(*(place.chat.close for place in self._places))

    def _forget(self, key: str, future: Future[Response]) -> None:
        with self._lock:
            if self._waiting.get(key) is future:
                del self._waiting[key]

    async def _answer(self, role: Role, call: Call, key: str) -> Response:
        try:
            return await self._answered(role, call, key, estimate(call.body))
        except SpentError:
            # What is under way is paid for: whoever hears that all is spent may end the process.
            while self._under_way:
                await self._gate.settled()
            raise
        except (StoreError, DiskError) as error:
            self._gate.shut(error)
            raise

    async def _answered(self, role: Role, call: Call, key: str, tokens: Tokens) -> Response:
        while True:
            if (known := await self._others(key)) is not None:
                return known
            seat = await self._seat(role, tokens)
            claim: Response | Claim | None = None
            try:
                claim = await asyncio.wrap_future(self._store.claim(key))
            finally:
                if claim is not Claim.OURS:
                    seat.place.give_back(seat)
                    self._gate.notify()
                if claim is None:
                    self._store.release(key)
            if claim is Claim.OURS:
                break
        try:
            return await self._asked(role, call, key, seat, tokens)
        except BaseException:
            self._store.release(key)
            raise

    async def _others(self, key: str) -> Response | None:
        """The response to a call, once nobody else is about to ask it; None where it is to be asked."""
        waited = False
        while (found := self._store.look(key)) is Claim.THEIRS:
            waited = True
            await self._gate.sleep(self._pace.poll)
        if not isinstance(found, Response):
            return None
        if waited:
            self._tally.waited_for()
        return found

    async def _seat(self, role: Role, tokens: Tokens) -> Seat:
        """Room for one try, unless all is spent that may be."""
        seat = await role.pool.take(tokens.all)
        if self._max_cost is not None and (spent := self._store.totals().cost) >= self._max_cost:
            seat.place.give_back(seat)
            self._gate.shut(
                SpentError(
                    f"answers have cost {spent:g}, and --max-cost is {self._max_cost:g}; all of them are stored, and "
                    "the same command with a higher --max-cost goes on"
                )
            )
            self._gate.check()
        return seat

    async def _asked(self, role: Role, call: Call, key: str, seat: Seat, tokens: Tokens) -> Response:
        """Try until there is a response, and store it."""
        tries = fruitless = 0
        while True:
            outcome: Outcome | None = None
            self._under_way += 1
            try:
                outcome = await self._tried(role, call, seat)
                # A try that found no connection asked nothing, and is held against the endpoint alone.
                tries += not isinstance(outcome, ComeAgain) or outcome.reached
                response = response_to(
                    outcome, seat.place.endpoint, tokens, tries=tries, last=tries >= role.model.tries
                )
                if response is not None:
                    # The seat is kept until then: whoever has it next is to know what this one cost.
                    stored = await asyncio.wrap_future(self._store.put(key, call, response))
                    self._tally.responded(stored)
                    return stored
            finally:
                self._under_way -= 1
                seat.place.end(seat, outcome, now=time.monotonic())
                self._gate.notify()
            fruitless += 1
            if isinstance(outcome, ComeAgain) and outcome.retry_after is None:
                await self._gate.sleep(self._pace.pause(fruitless, drawn_by=f"{self._seed} {key} {fruitless}"))
            seat = await self._seat(role, tokens)

    async def _tried(self, role: Role, call: Call, seat: Seat) -> Outcome:
        place = seat.place
        named = {} if place.endpoint.served_model is None else {"model": place.endpoint.served_model}
        outcome = await place.chat.try_once({**call.body, **named})
        self._tally.tried(outcome)
        if isinstance(outcome, RefusesAll):
            variable = place.endpoint.key
            key = (
                "name the variable with its key as the endpoint's key"
                if variable is None
                else f"set {variable} to one that it takes"
            )
            model = "name the model that it serves as served_model"
            said = refuses_all_because(outcome, place.chat.url, key=key, model=model)
            self._gate.shut(ConfigError(f"{role.name}: {said}"))
            self._gate.check()
        return outcome
