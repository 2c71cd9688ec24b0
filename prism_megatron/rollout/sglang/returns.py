"""Servers that other processes start are watched: one that is back gets the weights in use before it takes part again.

Runs in the process that hands weights over. A server that was restarted unnoticed is found by the version it reports:
a name, where trainers give numbers. What has another number has another trainer, and is left to whoever asks it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from prism_megatron.errors import PrismError, RolloutError
from prism_megatron.rollout.sglang.http import ServerClient, ServerLostError
from prism_megatron.rollout.sglang.keeper import Keeper

_LONGEST_PAUSE_SECONDS = 60.0


class Weights(Protocol):
    """What servers are to hold."""

    @property
    def version(self) -> int | None:
        """Of the weights in use; None while there are none."""

    def restore(self, url: str, *, lost: bool = True) -> bool:
        """Give the server the weights in use; one that is not known to be ``lost`` may turn out to have them.

        False for such a one, and for one that cannot be given them before the next update. Raises WeightSyncError or
        RolloutError.
        """


class Returns:
    """A thread that asks servers which version they have, and has those restored that lack the weights in use."""

    def __init__(
        self,
        clients: Sequence[ServerClient],
        keeper: Keeper,
        weights: Weights,
        *,
        check: Callable[[ServerClient], object],
        log: Path,
        poll_seconds: float,
    ) -> None:
        """``check`` raises RolloutError for a server that must not be used. ``log`` is told of losses and returns.

        A server that could not be given its weights is tried again, after ever longer pauses of up to a minute.
        """
        self._clients = tuple(client for client in clients if client.url in keeper.foreign)
        self._keeper = keeper
        self._weights = weights
        self._check = check
        self._log = log
        self._poll_seconds = poll_seconds
        self._pauses: dict[str, float] = {}
        self._not_before: dict[str, float] = {}
        self._told_out: set[str] = set()
        self._waiting: set[str] = set()  # there again, and without the weights in use before the next update
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sglang returns", daemon=True)

    def start(self) -> None:
        """Begin to watch; harmless where that has begun, or where all servers are this process's own."""
        if self._clients and self._thread.ident is None:
            self._thread.start()

    def admit_waiting(self) -> None:
        """Let servers take part in the next update that are there again and could be given nothing before it."""
        with self._lock:
            waiting, self._waiting = self._waiting, set()
        for url in waiting:
            self._let_in(url, "takes part in the next update")

    def stop(self) -> None:
        """End the watch, once a server that is being given weights has them."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stopping.wait(self._poll_seconds):
            for client in self._clients:
                if time.monotonic() >= self._not_before.get(client.url, 0.0):
                    self._look_at(client)

    def _look_at(self, client: ServerClient) -> None:
        """Nothing is raised: who needs the server finds out what is wrong with it, and says so."""
        out = self._keeper.is_out(client.url)
        if out and client.url not in self._told_out:
            self._told_out.add(client.url)
            self._tell(f"{client.url} is lost; the others go on without it")
        try:
            try:
                # Asked once: a call that is repeated would keep the other servers waiting.
                held = str(client.get_once("/model_info")["weight_version"])
            except ServerLostError:
                return
            fresh = not held.isdecimal()
            restored = False
            if out or (fresh and self._weights.version is not None):
                self._check(client)
                restored = self._weights.restore(client.url, lost=out)
        except PrismError as error:
            self._failed(client, error)
            return
        self._pauses.pop(client.url, None)
        if restored:
            with self._lock:
                self._waiting.discard(client.url)
            self._let_in(client.url, f"is back, with version {self._weights.version}")
        elif out:
            with self._lock:
                self._waiting.add(client.url)

    def _let_in(self, url: str, what: str) -> None:
        self._keeper.admit(url)
        self._told_out.discard(url)
        self._tell(f"{url} {what}")

    def _failed(self, client: ServerClient, error: PrismError) -> None:
        pause = self._pauses.get(client.url, self._poll_seconds)
        self._pauses[client.url] = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        self._not_before[client.url] = time.monotonic() + pause
        self._tell(f"{client.url} is there and cannot be used yet: {error}")
        if not self._keeper.is_attached(client.url):
            with suppress(RolloutError):  # given up: whoever needs the server is told
                self._keeper.replace(client.url)

    def _tell(self, text: str) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
