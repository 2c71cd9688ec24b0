"""Asking SGLang servers for answers: which server is asked, when it is asked again, and which answers count.

An answer counts only if it is whole and no token of it was sampled with other weights than those that were in use since
it was asked for. Drawing leaves no trace on a server, so a request that broke off is simply made again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from prism_megatron.errors import RolloutError
from prism_megatron.observability.activity import Advance
from prism_megatron.rollout.base import Finished, Sampling, SegmentFinder
from prism_megatron.rollout.sglang.http import (
    SHORTEST_SECONDS,
    ServerClient,
    ServerLostError,
    ServerRefusedError,
)
from prism_megatron.rollout.sglang.keeper import Keeper
from prism_megatron.rollout.sglang.pool import Place, Pool
from prism_megatron.rollout.sglang.requests import Answer, RequestFormat, ending
from prism_megatron.rollout.sglang.served_weights import ServedWeights
from prism_megatron.types import Prompt, Rollout

_MAX_FAILURES = 5
_ABORT_SECONDS, _ABORT_PAUSE_SECONDS = 10.0, 0.05
_RETRIED = (408, 429, 500, 502, 503, 504)


class _OtherWeightsError(RolloutError):
    """A server has weights that are not the version in use; ``fresh`` says that they are those of its start."""

    def __init__(self, message: str, *, fresh: bool) -> None:
        super().__init__(message)
        self.fresh = fresh


def _nobody(_count: int) -> None:
    """Nobody watches."""


class Sampler:
    """Requests to running servers, each from a thread of its own."""

    def __init__(
        self,
        clients: Sequence[ServerClient],
        routed: Sequence[ServerClient],
        form: RequestFormat,
        finder: SegmentFinder,
        weights: ServedWeights,
        *,
        keeper: Keeper,
        near: Collection[str],
        max_in_flight: int,
        seconds: float,
    ) -> None:
        """Requests go to ``routed``: the servers themselves, ``clients``, or a router over them.

        ``keeper`` says whether a lost server comes back; ``weights`` which versions are in use. Servers that are
        ``near`` are asked before others. For the rest see ``SGLangOptions``.
        """
        self._clients = tuple(clients)
        self._pool = Pool(routed, near, keeper.is_out)
        self._form = form
        self._finder = finder
        self._weights = weights
        self._keeper = keeper
        self._seconds = seconds
        self._closing = threading.Event()
        self._threads = ThreadPoolExecutor(max_in_flight, thread_name_prefix="sglang requests")

    def generate(
        self,
        prompts: Sequence[Prompt],
        counts: Sequence[int],
        sampling: Sampling,
        *,
        since: int,
        advance: Advance = _nobody,
        finished: Finished | None = None,
    ) -> list[tuple[Rollout, ...]]:
        """``counts[p]`` samples of each prompt, with no token by an older version than ``since``.

        ``advance`` is told of samples that have come, ``finished`` of each prompt with all of its samples.

        Raises DataError for images that the servers would see otherwise, and RolloutError when no whole answer comes
        in time. Earlier calls are served first.
        """
        deadline = time.monotonic() + self._seconds

        def sample(place: int, prompt: Prompt, count: int) -> tuple[Rollout, ...]:
            answers = self._sample(prompt, count, sampling, since, deadline=deadline)
            advance(count)
            rollouts = tuple(self._rollout(prompt, answer, sampling) for answer in answers)
            if finished is not None:
                finished(place, rollouts)
            return rollouts

        pairs = enumerate(zip(prompts, counts, strict=True))
        futures = [self._threads.submit(sample, place, *pair) for place, pair in pairs]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def score(self, prompt: Prompt, response: Sequence[int]) -> dict[str, tuple[float, ...]]:
        """Log-probs of ``response`` at temperature 1, as each server has them, by URL. Raises RolloutError.

        A lost server that the run starts again is waited for, no longer than ``generate`` waits, until it has the
        weights in use. Servers that are left out, and attached ones that are lost, are not among the scores; one is.
        """
        body = self._form.scoring_request(prompt, response)
        scores: dict[str, tuple[float, ...]] = {}
        problem: RolloutError | None = None
        for client in self._clients:
            if self._keeper.is_out(client.url):
                continue
            try:
                scores[client.url] = self._form.scores(prompt, response, self._scored(client, body))
            except (ServerLostError, _OtherWeightsError) as error:
                if not (self._keeper.is_attached(client.url) and self._is_passing(error, client.url)):
                    raise
                problem = error
        if not scores:
            raise problem or RolloutError("all servers are lost; none has scored the probe")
        return scores

    def _scored(self, client: ServerClient, body: dict[str, Any]) -> Any:
        """One server's answer, once it has the weights in use."""
        deadline = time.monotonic() + self._seconds
        problem: RolloutError
        while True:
            try:
                held = str(client.get("/model_info")["weight_version"])
                if held == str(self._weights.version):
                    return client.post("/generate", body)
                message = f"{client.url} does not hold version {self._weights.version}"
                problem = _OtherWeightsError(message, fresh=not held.isdecimal())
            except ServerLostError as error:
                problem = error
            # What the run does not start is in nobody's hands: the others are enough.
            if self._keeper.is_attached(client.url) or time.monotonic() > deadline:
                raise problem
            if not self._keeper.comes_back(client.url):
                raise problem
            time.sleep(client.patience.first_pause)

    def close(self) -> None:
        """Have the servers end what they are generating, and start nothing more."""
        self._closing.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + _ABORT_SECONDS
        while self._pool.is_busy() and time.monotonic() < deadline:  # again, for a request that was just being sent
            for client in self._clients:
                with suppress(RolloutError):
                    client.post("/abort_request", {"abort_all": True}, seconds=_ABORT_SECONDS)
            time.sleep(_ABORT_PAUSE_SECONDS)

    def _sample(self, prompt: Prompt, n: int, sampling: Sampling, since: int, *, deadline: float) -> Sequence[Answer]:
        """All samples of one prompt, from whichever server gives them whole and by no older version than ``since``."""
        body = self._form.request(prompt, n, sampling)
        failures = 0
        while True:
            with self._pool.least_loaded(n, deadline) as place:
                problem = self._attempt(place, prompt, body, since=since, deadline=deadline)
            if isinstance(problem, list):
                return problem
            if self._closing.is_set():
                raise RolloutError(f"prompt {prompt.id!r}: the rollout engine was closed while it was being answered")
            if not self._is_passing(problem, place.client.url):
                failures += 1
            if failures == _MAX_FAILURES or time.monotonic() >= deadline:
                raise RolloutError(f"prompt {prompt.id!r} was not answered, {failures} attempts failed: {problem}")

    def _is_passing(self, problem: RolloutError, url: str) -> bool:
        """Whether the server is lost, or lacks weights that it will be given, and is worth waiting for.

        An attached server with numbered weights of others has another trainer. Raises as ``Keeper.comes_back``.
        """
        if isinstance(problem, _OtherWeightsError):
            return (problem.fresh or not self._keeper.is_attached(url)) and self._keeper.comes_back(url)
        return isinstance(problem, ServerLostError) and self._keeper.comes_back(url)

    def _attempt(
        self, place: Place, prompt: Prompt, body: dict[str, Any], *, since: int, deadline: float
    ) -> list[Answer] | RolloutError:
        """Ask one server once: its samples, or what was wrong if asking again may help."""
        client = place.client
        try:
            answer = client.post("/generate", body, seconds=max(deadline - time.monotonic(), SHORTEST_SECONDS))
        except ServerLostError as error:
            place.failed()
            return error
        except ServerRefusedError as error:
            if error.status not in _RETRIED:
                raise RolloutError(f"prompt {prompt.id!r}: {error}") from error
            place.failed()
            return error
        answers = self._form.answers(prompt, body["sampling_params"]["n"], answer)
        if answers is None:
            place.failed()
            return RolloutError(f"{client.url} broke off its answer")
        if not all(self._in_use(answer, since) for answer in answers):
            place.failed()
            return _OtherWeightsError(
                f"{client.url} sampled with other weights than version {since}; was it restarted, or does another "
                "trainer update it?",
                fresh=any(answer.versions is None for answer in answers),
            )
        place.worked()
        self._keeper.answered(client.url)
        return answers

    def _in_use(self, answer: Answer, since: int) -> bool:
        """Whether every token is of a version that the servers were given, and of none older than ``since``."""
        newest = self._weights.newest_version
        if answer.versions is None or newest is None:
            return False
        return all(since <= span.version <= newest for span in answer.versions)

    def _rollout(self, prompt: Prompt, answer: Answer, sampling: Sampling) -> Rollout:
        assert answer.versions is not None
        length, reason = ending(
            prompt,
            answer.token_ids,
            self._finder.watch(),
            end_token_ids=self._form.end_token_ids,
            max_new_tokens=sampling.max_new_tokens,
        )
        token_ids = answer.token_ids[:length]
        return Rollout(
            token_ids=token_ids,
            logprobs=answer.logprobs[:length],
            finish_reason=reason,
            versions=tuple(s._replace(end=min(s.end, length)) for s in answer.versions if s.start < length),
            segments=self._finder.find(token_ids),
        )
