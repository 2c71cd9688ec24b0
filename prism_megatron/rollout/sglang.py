"""Rollouts by SGLang servers over HTTP: token ids go in, token ids and log-probs come out.

Which server answered, and how often a request had to be made again, shows nowhere in the result: an answer counts only
if it is whole and no token of it was sampled with other weights than those that were in use since it was asked for, and
drawing leaves no trace on a server, so a request that broke off is simply made again. Unlike the embedded engine's, the
draws are the servers' own: they follow the same distribution but cannot be repeated.

One thread may update the weights while others generate: the servers pause, and unfinished answers go on with the new
weights. Their keys and values are computed again, so each token is drawn from its version's own distribution.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.conversion.announced import AnnouncedWeights, left_out_of
from prism_megatron.conversion.expert_layout import ExpertLayout, per_expert_shapes
from prism_megatron.conversion.hf_reader import HFFolder
from prism_megatron.data.images import ImagePreprocessor
from prism_megatron.errors import DataError, PrismError, RolloutError, WeightSyncError
from prism_megatron.rollout import sglang_memory
from prism_megatron.rollout.base import Sampling, SegmentFinder
from prism_megatron.rollout.sglang_attach import ServedModel, attach, attach_router
from prism_megatron.rollout.sglang_http import (
    CONNECT_SECONDS,
    FIRST_PAUSE_SECONDS,
    ServerClient,
    ServerLostError,
    ServerRefusedError,
)
from prism_megatron.rollout.sglang_pool import Place, Pool
from prism_megatron.rollout.sglang_requests import Answer, RequestFormat, ending
from prism_megatron.rollout.sglang_server import SGLangServers
from prism_megatron.rollout.sglang_weights import LostVersionError, Transport, WeightSync
from prism_megatron.rollout.weight_buckets import Piece, pieces
from prism_megatron.rollout.weight_checks import WeightCheck
from prism_megatron.rollout.weight_spool import Spool, spool_folder
from prism_megatron.types import Prompt, Rollout

_MAX_FAILURES = 5
_ABORT_SECONDS, _ABORT_PAUSE_SECONDS = 10.0, 0.05
_RETRIED = (408, 429, 500, 502, 503, 504)


class _OtherWeightsError(RolloutError):
    """A server sampled with weights that are not the version in use, as one does that has just been restarted."""


@dataclass(frozen=True)
class SGLangOptions:
    """How the client uses its servers."""

    transport: Transport = "tensor"
    """``tensor`` sends weights over HTTP, ``disk`` the path of a folder that all servers can read; ``group`` sends
    them through a process group with each server's workers"""
    bucket_bytes: int = 256 * 2**20
    """a hand-over takes two such buckets of memory at most, or two of its largest tensors"""
    master_address: str = "127.0.0.1"
    """where servers reach this process, for ``group``"""
    max_in_flight: int = 32
    """requests under way at once, over all servers and calls; each holds one prompt with all its samples"""
    seconds: float = 600.0
    """how long one call of ``generate`` may take, restarts of servers included"""
    router: str | None = None
    """URL of an sglang-router over the same servers: it shares requests out, all other calls go to each server"""
    colocated: bool = False
    """servers are on the trainer's GPUs: ``sleep`` releases their memory, ``wake`` takes it back"""


class SGLangRollout:
    """A RolloutEngine on running servers, which it started itself or which are given by URL.

    Experts travel one by one, so that no tensor has to be put together whole. SGLang 0.5.23 loads their names from a
    folder and from an update by the same code, each into its slice of a layer's stacked ``experts.w13_weight`` or
    ``w2_weight``; these are what its checksum covers.
    """

    expert_layout: ExpertLayout = "per_expert"

    def __init__(
        self,
        model_folder: Path,
        finder: SegmentFinder,
        *,
        urls: Sequence[str],
        api_key: str | None,
        end_token_ids: Sequence[int],
        spool: Path,
        servers: SGLangServers | None = None,
        supervised_elsewhere: bool = False,
        options: SGLangOptions | None = None,
    ) -> None:
        """``spool`` is a folder for the newest weights, and for a moment those before them: room for two models.

        ``servers`` are the supervised ones behind ``urls``; the engine stops them when it is closed. Servers that are
        ``supervised_elsewhere``, by another process, are waited for when they are lost. Raises RolloutError for a
        server that cannot be reached, refuses the key or serves another model.
        """
        if not urls:
            raise RolloutError("SGLang rollouts need at least one server; start some or give their URLs")
        self._options = options or SGLangOptions()
        self._folder = model_folder
        self._finder = finder
        self._end_token_ids = frozenset(end_token_ids)
        self._servers = servers
        self._supervised_elsewhere = supervised_elsewhere
        self._spool = spool
        config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
        self._format = RequestFormat(
            ImagePreprocessor.from_folder(model_folder),
            image_token_id=config["image_token_id"],
            end_token_ids=end_token_ids,
            never_sampled=[config["image_token_id"], config["video_token_id"]],
        )
        shapes = per_expert_shapes(HFFolder(model_folder), Qwen3VLShape.from_folder(model_folder))
        self._model = WeightCheck(shapes, tied=bool(config.get("tie_word_embeddings", False)))
        self._clients = tuple(ServerClient(url, api_key=api_key) for url in urls)
        model = ServedModel(model_folder, config["model_type"], tuple(self._model.shapes))
        over_http = self._options.transport == "tensor"
        self._context_length = min(
            attach(client, model, colocated=self._options.colocated, over_http=over_http) for client in self._clients
        )
        self._routed = self._clients
        if self._options.router is not None:
            self._routed = (ServerClient(self._options.router, api_key=api_key),)
            attach_router(*self._routed)
        self._pool = Pool(self._routed)
        self._sync = WeightSync(
            self._clients,
            transport=self._options.transport,
            bucket_bytes=self._options.bucket_bytes,
            master_address=self._options.master_address,
            replace=self._replace,
        )
        self._held: tuple[Path, int] | None = None
        self._version: int | None = None
        self._newest_version: int | None = None
        self._num_updates = 0
        self._asleep = False
        self._closing = threading.Event()
        self._threads = ThreadPoolExecutor(self._options.max_in_flight, thread_name_prefix="sglang requests")
        self._weights_lock = threading.Lock()
        if servers is not None:
            servers.on_restart(self._restore)

    @property
    def policy_version(self) -> int | None:
        """Version of the weights in use; None until a first complete update."""
        return self._version

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take every weight of the policy, on all servers or on none; see ``WeightSync``.

        Names and shapes are checked against the model folder before anything is sent: those of ``AnnouncedWeights``
        at once, and the tensors flow to the servers as they are gathered; others only once all have come. Weights
        that are left out must have come before. Raises WeightSyncError; all servers then have the version they had,
        unless they could not go back, when generating is refused.
        """
        with self._weights_lock:
            left_out = left_out_of(tensors)
            if left_out and self._held is None:
                raise WeightSyncError(f"{len(left_out)} weights are left out and the servers have none; send all first")
            spool = Spool(spool_folder(self._spool, self._num_updates), like=self._folder)
            self._num_updates += 1
            self.expect(version)
            try:
                self._take(tensors, version, spool)
            except PrismError as error:
                spool.remove()
                if isinstance(error, LostVersionError):
                    self._hold(None)
                self._newest_version = self._version
                raise
            self._hold((spool.folder, version))

    def sleep(self) -> None:
        """Colocated servers release the memory of their weights, keys and values; others keep it.

        No request may be under way: SGLang ends with one. Raises RolloutError.
        """
        with self._weights_lock:
            if self._options.colocated and not self._asleep:
                self._asleep = True
                sglang_memory.release(self._clients, replace=self._replace)

    def wake(self) -> None:
        """End what ``sleep`` began, with the weights there were. Raises WeightSyncError; none are in use then."""
        with self._weights_lock:
            if self._asleep and self._held is not None:
                try:
                    self._push(*self._held)
                except WeightSyncError:
                    self._hold(None)
                    raise

    def expect(self, version: int) -> None:
        """Take note that the servers are about to be given ``version``: answers may come with it from now on."""
        self._newest_version = version

    def follow(self, version: int | None) -> None:
        """Take note that another process has given the servers ``version`` (or that they have none in common)."""
        self._version = self._newest_version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        prompt_offset: int = 0,
        samples: Sequence[range] | None = None,
    ) -> list[tuple[Rollout, ...]]:
        """Draw ``n`` responses for each prompt, or as many as ``samples`` has of it, in the order of the prompts.

        Servers draw from generators of their own: ``seed``, ``step`` and the numbers of prompts change nothing. Raises
        WeightSyncError before a first complete update, DataError for a prompt that does not fit the servers' context
        or whose images they would see differently, and RolloutError when no whole answer comes in time. Threads may
        call it beside each other and beside ``update_weights``; earlier calls are served first.
        """
        del seed, step, prompt_offset
        version = self.policy_version
        if self._asleep:
            raise WeightSyncError("the rollout servers have released their memory; call wake or update_weights first")
        if version is None:
            raise WeightSyncError("the rollout servers have no complete set of weights; call update_weights first")
        for prompt in prompts:
            # SGLang refuses a prompt that fills its context, and keeps a few tokens to itself.
            if len(prompt.token_ids) + sampling.max_new_tokens > self._context_length:
                raise DataError(
                    f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens; with {sampling.max_new_tokens} new ones "
                    f"it exceeds the servers' {self._context_length}; shorten it, lower max_new_tokens, or start the "
                    "servers with a larger context length"
                )
        deadline = time.monotonic() + self._options.seconds

        counts = [n] * len(prompts) if samples is None else [len(numbers) for numbers in samples]

        def sample(prompt: Prompt, count: int) -> tuple[Rollout, ...]:
            answers = self._sample(prompt, count, sampling, version, deadline=deadline)
            return tuple(self._rollout(prompt, answer, sampling) for answer in answers)

        futures = [self._threads.submit(sample, *pair) for pair in zip(prompts, counts, strict=True)]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def score(self, prompt: Prompt, response: Sequence[int]) -> dict[str, tuple[float, ...]]:
        """Log-probs of ``response`` at temperature 1, as each server has them, by URL. Raises RolloutError.

        A server that is lost and comes back, with the weights in use, is waited for no longer than ``generate`` waits.
        """
        body = self._format.scoring_request(prompt, response)
        scores = {}
        for client in self._clients:
            deadline = time.monotonic() + self._options.seconds
            answer = None
            while answer is None:
                try:
                    if client.get("/model_info")["weight_version"] == str(self._version):
                        answer = client.post("/generate", body)
                        continue
                    problem = RolloutError(f"{client.url} does not hold version {self._version}")
                except ServerLostError as error:
                    problem = error
                if time.monotonic() > deadline or not self._supervised(client.url):
                    raise problem
                time.sleep(FIRST_PAUSE_SECONDS)
            scores[client.url] = self._format.scores(prompt, response, answer)
        return scores

    def close(self) -> None:
        """End what is being generated, close the connections, stop own servers and remove the spooled weights.

        A ``generate`` that another thread is in raises RolloutError there, or CancelledError. May be called again.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + _ABORT_SECONDS
        while self._pool.is_busy() and time.monotonic() < deadline:  # again, for a request that was just being sent
            for client in self._clients:
                with suppress(RolloutError):
                    client.post("/abort_request", {"abort_all": True}, seconds=_ABORT_SECONDS)
            time.sleep(_ABORT_PAUSE_SECONDS)
        self._sync.close()
        for client in {*self._clients, *self._routed}:
            client.close()
        if self._servers is not None:
            self._servers.stop()
        self._hold(None)

    def _take(self, tensors: Iterable[tuple[str, Tensor]], version: int, spool: Spool) -> None:
        left_out = left_out_of(tensors)
        count = None
        if isinstance(tensors, AnnouncedWeights):
            self._model.check_names(tensors.shapes, left_out=left_out)
            count = len(tensors.shapes)
        checked = self._model.passed(tensors, left_out=left_out)
        passing = self._spooled(pieces(checked, self._options.bucket_bytes, count=count), spool, left_out)
        refilling = bool(left_out) and not self._hold_the_rest()
        if count is None or refilling or self._options.transport == "disk":
            deque(passing, maxlen=0)
            self._push(spool.folder, version)
        else:
            self._push(spool.folder, version, passing)

    def _hold_the_rest(self) -> bool:
        """Whether all servers have what an update leaves out: not if they slept, or were started again unnoticed."""
        if self._asleep:
            return False
        try:
            held = [client.get("/model_info", seconds=CONNECT_SECONDS)["weight_version"] for client in self._clients]
        except RolloutError:
            return False
        return held == [str(self._version)] * len(held)

    def _spooled(self, passing: Iterator[Piece], spool: Spool, left_out: AbstractSet[str]) -> Iterator[Piece]:
        """The same pieces, each written on its way; the spool is a whole model folder once all have passed."""
        if left_out and self._held is not None:
            spool.carry_over(self._held[0], left_out)
        for piece in passing:
            spool.add(piece.tensors)
            yield piece
        spool.finish()

    def _hold(self, held: tuple[Path, int] | None) -> None:
        """Keep the folder of the weights in use, and no other."""
        older, self._held = self._held, held
        self._version = None if held is None else held[1]
        if older is not None:
            shutil.rmtree(older[0])

    def _push(self, folder: Path, version: int, passing: Iterator[Piece] | None = None) -> None:
        """Hand a folder's weights over, to servers asleep as to others. Arguments and errors of ``WeightSync.push``.

        Memory that was released holds nothing when it is back: until a whole update, or one of the weights before, has
        gone through, the servers would sample with garbage under the old version's name.
        """
        waking, self._asleep = self._asleep, False
        if waking:
            try:
                sglang_memory.resume(self._clients, replace=self._replace)
            except RolloutError as error:
                raise LostVersionError(f"version {version} was not handed over: {error}") from error
        try:
            self._sync.push(folder, version, previous=self._held, passing=passing)
        except LostVersionError:
            raise
        except WeightSyncError as error:
            if waking:
                self._refill(error)
            raise

    def _refill(self, problem: WeightSyncError) -> None:
        """Give the servers the weights they had before they slept. Raises LostVersionError."""
        if self._held is None:
            raise LostVersionError(f"the servers woke without weights: {problem}") from problem
        try:
            self._sync.push(*self._held, previous=None)
        except WeightSyncError as error:
            raise LostVersionError(f"the servers woke without weights: {error} (after: {problem})") from error

    def _sample(self, prompt: Prompt, n: int, sampling: Sampling, since: int, *, deadline: float) -> Sequence[Answer]:
        """All samples of one prompt, from whichever server gives them whole and by no older version than ``since``."""
        body = self._format.request(prompt, n, sampling)
        failures = 0
        while True:
            with self._pool.least_loaded(n, deadline) as place:
                problem = self._attempt(place, prompt, body, since=since, deadline=deadline)
            if isinstance(problem, list):
                return problem
            if self._closing.is_set():
                raise RolloutError(f"prompt {prompt.id!r}: the rollout engine was closed while it was being answered")
            comes_back = isinstance(problem, (ServerLostError, _OtherWeightsError))
            if not (comes_back and self._supervised(place.client.url)):
                failures += 1
            if failures == _MAX_FAILURES or time.monotonic() >= deadline:
                raise RolloutError(f"prompt {prompt.id!r} was not answered, {failures} attempts failed: {problem}")

    def _attempt(
        self, place: Place, prompt: Prompt, body: dict[str, Any], *, since: int, deadline: float
    ) -> list[Answer] | RolloutError:
        """Ask one server once: its samples, or what was wrong if asking again may help."""
        client = place.client
        try:
            answer = client.post("/generate", body, seconds=max(deadline - time.monotonic(), FIRST_PAUSE_SECONDS))
        except ServerLostError as error:
            place.failed()
            return error
        except ServerRefusedError as error:
            if error.status not in _RETRIED:
                raise RolloutError(f"prompt {prompt.id!r}: {error}") from error
            place.failed()
            return error
        answers = self._format.answers(prompt, body["sampling_params"]["n"], answer)
        if answers is None:
            place.failed()
            return RolloutError(f"{client.url} broke off its answer")
        if not all(self._in_use(answer, since) for answer in answers):
            place.failed()
            return _OtherWeightsError(
                f"{client.url} sampled with other weights than version {since}; was it restarted, or does another "
                "trainer update it?"
            )
        place.worked()
        return answers

    def _in_use(self, answer: Answer, since: int) -> bool:
        """Whether every token is of a version that the servers were given, and of none older than ``since``."""
        newest = self._newest_version
        if answer.versions is None or newest is None:
            return False
        return all(since <= span.version <= newest for span in answer.versions)

    def _rollout(self, prompt: Prompt, answer: Answer, sampling: Sampling) -> Rollout:
        assert answer.versions is not None
        length, reason = ending(
            prompt,
            answer.token_ids,
            self._finder.watch(),
            end_token_ids=self._end_token_ids,
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

    def _supervised(self, url: str) -> bool:
        return self._supervised_elsewhere or (self._servers is not None and self._servers.supervises(url))

    def _replace(self, url: str) -> bool:
        return self._servers is not None and self._servers.replace(url)

    def _restore(self, url: str) -> None:
        """Give a restarted server the weights in use; it waits for an update that is under way."""
        with self._weights_lock:
            if self._asleep:
                sglang_memory.release([client for client in self._clients if client.url == url], replace=self._replace)
            elif self._held is not None:
                self._sync.push_to(url, *self._held)
