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
import re
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prism_megatron.conversion.hf_reader import HFFolder
from prism_megatron.data.images import ImagePreprocessor
from prism_megatron.errors import DataError, RolloutError, WeightSyncError
from prism_megatron.rollout.base import Sampling, SegmentFinder
from prism_megatron.rollout.sglang_http import (
    FIRST_PAUSE_SECONDS,
    ServerClient,
    ServerLostError,
    ServerRefusedError,
)
from prism_megatron.rollout.sglang_pool import Place, Pool
from prism_megatron.rollout.sglang_requests import Answer, RequestFormat
from prism_megatron.rollout.sglang_server import SGLangServers
from prism_megatron.rollout.sglang_weights import TIED_NAME, LostVersionError, Transport, WeightSync, write_checked
from prism_megatron.types import Prompt, Rollout

_ATTACH_SECONDS = 3.0
_MAX_FAILURES = 5
_ABORT_SECONDS, _ABORT_PAUSE_SECONDS = 10.0, 0.05
_RETRIED = (429, 500, 502, 503, 504)
_LAYER = re.compile(r"(visual\.blocks|(?<!visual\.)layers)\.(\d+)\.")


class _OtherWeightsError(RolloutError):
    """A server sampled with weights that are not the version in use, as one does that has just been restarted."""


@dataclass(frozen=True)
class SGLangOptions:
    """How the client uses its servers."""

    transport: Transport = "tensor"
    """``tensor`` sends weights over HTTP; ``disk`` sends the path of a folder that all servers can read"""
    bucket_bytes: int = 256 * 2**20
    """most bytes of weights in one call; a larger tensor travels alone"""
    max_in_flight: int = 32
    """requests under way at once, over all servers and calls; each holds one prompt with all its samples"""
    seconds: float = 600.0
    """how long one call of ``generate`` may take, restarts of servers included"""


class SGLangRollout:
    """A RolloutEngine on running servers, which it started itself or which are given by URL."""

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
        self._shapes = HFFolder(model_folder).shapes()
        self._tied = bool(config.get("tie_word_embeddings", False))
        self._clients = tuple(ServerClient(url, api_key=api_key) for url in urls)
        self._context_length = min(self._check(client, config) for client in self._clients)
        self._pool = Pool(self._clients)
        self._sync = WeightSync(
            self._clients,
            transport=self._options.transport,
            bucket_bytes=self._options.bucket_bytes,
            replace=self._replace,
        )
        self._held: tuple[Path, int] | None = None
        self._version: int | None = None
        self._newest_version: int | None = None
        self._num_updates = 0
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

        Names and shapes are checked against the model folder before anything is sent. Raises WeightSyncError; all
        servers then have the version they had, unless they could not go back, when generating is refused.
        """
        with self._weights_lock:
            folder = self._spool / f"weights-{self._num_updates}"
            self._num_updates += 1
            write_checked(folder, tensors, like=self._folder, shapes=self._shapes, tied=self._tied)
            self.expect(version)
            try:
                self._sync.push(folder, version, previous=self._held)
            except WeightSyncError as error:
                shutil.rmtree(folder)
                if isinstance(error, LostVersionError):
                    self._hold(None)
                self._newest_version = self._version
                raise
            self._hold((folder, version))

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
            return tuple(self._rollout(answer) for answer in answers)

        futures = [self._threads.submit(sample, *pair) for pair in zip(prompts, counts, strict=True)]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def close(self) -> None:
        """End what is being generated, close the connections, stop own servers and remove the spooled weights.

        A ``generate`` that another thread is in raises RolloutError there, or CancelledError.
        """
        self._closing.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        deadline = time.monotonic() + _ABORT_SECONDS
        while self._pool.is_busy() and time.monotonic() < deadline:  # again, for a request that was just being sent
            for client in self._clients:
                with suppress(RolloutError):
                    client.post("/abort_request", {"abort_all": True}, seconds=_ABORT_SECONDS)
            time.sleep(_ABORT_PAUSE_SECONDS)
        self._sync.close()
        for client in self._clients:
            client.close()
        if self._servers is not None:
            self._servers.stop()
        self._hold(None)

    def _hold(self, held: tuple[Path, int] | None) -> None:
        """Keep the folder of the weights in use, and no other."""
        older, self._held = self._held, held
        self._version = None if held is None else held[1]
        if older is not None:
            shutil.rmtree(older[0])

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

    def _rollout(self, answer: Answer) -> Rollout:
        assert answer.versions is not None
        return Rollout(
            token_ids=answer.token_ids,
            logprobs=answer.logprobs,
            finish_reason=answer.finish_reason,
            versions=answer.versions,
            segments=self._finder.find(answer.token_ids),
        )

    def _supervised(self, url: str) -> bool:
        return self._supervised_elsewhere or (self._servers is not None and self._servers.supervises(url))

    def _replace(self, url: str) -> bool:
        return self._servers is not None and self._servers.replace(url)

    def _restore(self, url: str) -> None:
        """Give a restarted server the weights in use; it waits for an update that is under way."""
        with self._weights_lock:
            if self._held is not None:
                self._sync.push_to(url, *self._held)

    def _check(self, client: ServerClient, config: dict[str, Any]) -> int:
        """Most tokens the server takes. Raises RolloutError for a server with another model than the folder's."""
        info = client.get("/model_info", seconds=_ATTACH_SECONDS)
        names = client.post_again("/weights_checker", {"action": "checksum"})["ranks"][0]["checksums"]
        ours = (config["model_type"], _num_layers(name for name in self._shapes if name != TIED_NAME))
        theirs = (info["model_type"], _num_layers(names))
        if ours != theirs:
            raise RolloutError(
                f"{client.url} serves another model ({info['model_path']}: {_described(*theirs)}) than {self._folder} "
                f"({_described(*ours)}); start it with the policy's folder"
            )
        return int(client.get("/server_info")["context_length"])


def _num_layers(names: Iterable[str]) -> tuple[int, int]:
    """Layers of the language model and blocks of the vision tower, out of the names of weights."""
    found = {match.groups() for name in names if (match := _LAYER.search(name))}
    blocks = sum(kind == "visual.blocks" for kind, _ in found)
    return len(found) - blocks, blocks


def _described(model_type: str, layers: tuple[int, int]) -> str:
    return f"{model_type} of {layers[0]} layers and {layers[1]} vision blocks"
