"""Rollouts by SGLang servers over HTTP: token ids go in, token ids and log-probs come out.

Which server answered, and how often a request had to be made again, shows nowhere in the result: an answer counts only
if it is whole and no token of it was sampled with other weights than those that were in use since it was asked for, and
drawing leaves no trace on a server, so a request that broke off is simply made again. Unlike the embedded engine's, the
draws are the servers' own: they follow the same distribution but cannot be repeated.

One thread may update the weights while others generate: the servers pause, and unfinished answers go on with the new
weights. Their keys and values are computed again, so each token is drawn from its version's own distribution.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.conversion.announced_weights import WeightShare
from prism_megatron.conversion.expert_layout import ExpertLayout, per_expert_shapes
from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.data.pictures.images import ImagePreprocessor
from prism_megatron.errors import DataError, RolloutError, WeightSyncError
from prism_megatron.observability.activity import Activity
from prism_megatron.rollout.base import SampleRequest, SegmentFinder
from prism_megatron.rollout.sglang.attach import ServedModel, attach, attach_router
from prism_megatron.rollout.sglang.board import Board
from prism_megatron.rollout.sglang.http import Patience, ServerClient
from prism_megatron.rollout.sglang.keeper import Keeper
from prism_megatron.rollout.sglang.requests import RequestFormat
from prism_megatron.rollout.sglang.returns import Returns
from prism_megatron.rollout.sglang.sampler import Sampler
from prism_megatron.rollout.sglang.served_weights import ServedWeights
from prism_megatron.rollout.sglang.server import SGLangServers
from prism_megatron.rollout.sglang.share_sender import OpenUpdate, Sent
from prism_megatron.rollout.sglang.weights import Transport
from prism_megatron.rollout.weight_checks import WeightCheck
from prism_megatron.types import Prompt, Rollout


@dataclass(frozen=True)
class SGLangOptions:
    """How the client uses its servers."""

    transport: Transport = "tensor"
    """``tensor`` sends weights over HTTP, ``disk`` the path of a folder that all servers can read; ``group`` sends
    them through a process group with each server's workers, ``ipc`` says where they lie in GPU memory of this host"""
    bucket_bytes: int = 256 * 2**20
    """a hand-over takes two such buckets of memory at most, or two of its largest tensors"""
    master_address: str | None = None
    """where servers reach this process, for ``group``; None is the address that it has on the way to each of them"""
    spool_every: int = 1
    """of updates that several processes share, every how many-th is written to the spool folder"""
    max_in_flight: int = 32
    """requests under way at once, over all servers and calls; each holds one prompt with all its samples"""
    seconds: float = 600.0
    """how long one call of ``generate`` may take, restarts of servers included"""
    router: str | None = None
    """URL of an sglang-router over the same servers: it shares requests out, all other calls go to each server"""
    colocated: bool = False
    """servers are on the trainer's GPUs: ``sleep`` releases their memory, ``wake`` takes it back"""
    return_seconds: float = 300.0
    """how long a run goes on without any answer of servers that it did not start"""
    poll_seconds: float = 1.0
    """how often servers that other processes start are looked at"""
    patience: Patience = field(default_factory=Patience)
    """with servers that do not answer"""


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
        board: Board | None = None,
        near: Collection[str] = (),
        options: SGLangOptions | None = None,
    ) -> None:
        """``spool`` is a folder for the newest weights, and for a moment those before them: room for two models.

        ``servers`` are the supervised ones among ``urls``; the engine stops them when it is closed. The others were
        started by processes that read the ``board``; without one they were there before (see ``Keeper``). Servers that
        are ``near`` are asked before others. Raises RolloutError for a server that cannot be reached, refuses the key
        or serves another model.
        """
        if not urls:
            raise RolloutError("SGLang rollouts need at least one server; start some or give their URLs")
        self.activity = Activity()
        """what is told of answers that have come"""
        self._options = options or SGLangOptions()
        self._servers = servers
        self._keeper = Keeper(urls, servers, board, return_seconds=self._options.return_seconds)
        shape = Qwen3VLShape.from_folder(model_folder)
        self._format = _request_format(model_folder, shape, end_token_ids)
        check = WeightCheck(per_expert_shapes(HFFolder(model_folder), shape), tied=shape.text.tied)
        self._clients = tuple(ServerClient(url, api_key=api_key, patience=self._options.patience) for url in urls)
        model = ServedModel(model_folder, shape.model_type, tuple(check.shapes))
        check_server = partial(
            attach, model=model, colocated=self._options.colocated, over_http=self._options.transport == "tensor"
        )
        self._context_length = min(map(check_server, self._clients))
        self._routed = _routed(self._clients, self._options, api_key)
        self._weights = ServedWeights(
            self._clients,
            check,
            model_folder=model_folder,
            spool=spool,
            transport=self._options.transport,
            bucket_bytes=self._options.bucket_bytes,
            master_address=self._options.master_address,
            spool_every=self._options.spool_every,
            colocated=self._options.colocated,
            replace=self._keeper.replace,
            is_out=self._keeper.is_out,
        )
        self._sampler = Sampler(
            self._clients,
            self._routed,
            self._format,
            finder,
            self._weights,
            keeper=self._keeper,
            near=near,
            max_in_flight=self._options.max_in_flight,
            seconds=self._options.seconds,
        )
        self._returns = Returns(
            self._clients,
            self._keeper,
            self._weights,
            check=check_server,
            log=spool / "servers.log",
            poll_seconds=self._options.poll_seconds,
        )
        self._closed = False
        if servers is not None:
            servers.on_restart(self._weights.restore)

    @property
    def policy_version(self) -> int | None:
        """Version of the weights in use; None until a first complete update."""
        return self._weights.version

    @property
    def out(self) -> frozenset[str]:
        """Servers that are left out of updates until they have the weights in use."""
        return self._keeper.out()

    @property
    def took_back(self) -> int:
        """How often a server that others look after was lost and given weights again."""
        return self._keeper.num_admitted

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take every weight of the policy, on all servers or on none; see ``WeightSync``.

        Names and shapes are checked against the model folder before anything is sent: those of ``AnnouncedWeights``
        at once, and the tensors flow to the servers as they are gathered; others only once all have come. Weights
        that are left out must have come before. Raises WeightSyncError; all servers then have the version they had,
        unless they could not go back, when generating is refused.
        """
        self._weights.update(tensors, version)
        self._returns.start()

    def open_update(self, share: WeightShare, version: int) -> OpenUpdate:
        """Open an update to which several processes bring their shares. Errors as of ``ServedWeights.open``."""
        return self._weights.open(share, version)

    def send_share(self, update: OpenUpdate, share: WeightShare, *, part: int, keeps_last: bool) -> Sent:
        """Send this process's share, its ``part``; the process that opened the update ``keeps_last``. Never raises."""
        return self._weights.send(update, share, part=part, keeps_last=keeps_last)

    def finish_update(self, update: OpenUpdate, share: WeightShare, sent: Sequence[Sent]) -> None:
        """End the update that this process opened, once all have ``sent``. Raises LostVersionError."""
        self._weights.finish(update, share, sent)
        self._returns.start()

    def holds_rest(self) -> bool:
        """Whether an update may leave out what it does not change: all servers report the version in use.

        Lost servers that are there again, and could not be given that version, take part in the update.
        """
        self._returns.admit_waiting()
        return self._weights.holds_rest()

    @property
    def lacks_weights(self) -> bool:
        """Whether servers have released weights that an update should bring back."""
        return self._weights.lacks_weights

    def problem_with_files(self) -> str | None:
        """What went wrong with weights that this process writes aside."""
        return self._weights.problem_with_files()

    def sleep(self) -> None:
        """Colocated servers release the memory of their weights, keys and values; others keep it.

        No request may be under way: SGLang ends with one. Raises RolloutError.
        """
        self._weights.sleep()

    def wake(self) -> None:
        """End what ``sleep`` began: the newest weights and room for keys and values.

        Raises WeightSyncError; none are in use then.
        """
        self._weights.wake()

    def expect(self, version: int) -> None:
        """Take note that the servers are about to be given ``version``: answers may come with it from now on."""
        self._weights.expect(version)

    def follow(self, version: int | None, out: Collection[str] = ()) -> None:
        """Take note that another process has given the servers ``version`` (or that they have none in common).

        It has left the servers that are ``out`` for later.
        """
        self._weights.follow(version)
        self._keeper.follow(out)

    def generate(self, request: SampleRequest) -> list[tuple[Rollout, ...]]:
        """Draw what is asked for, in the order of the prompts.

        Servers draw from generators of their own: seed, step and the numbers of prompts change nothing. Raises
        WeightSyncError before a first complete update, DataError for a prompt that does not fit the servers' context
        or whose images they would see differently, and RolloutError when no whole answer comes in time. Threads may
        call it beside each other and beside ``update_weights``; earlier calls are served first.
        """
        version, prompts, sampling = self.policy_version, request.prompts, request.sampling
        if version is None:
            raise WeightSyncError("the rollout servers have no complete set of weights; call update_weights first")
        if self._weights.asleep:
            raise WeightSyncError("the rollout servers have released their memory; call wake first")
        for prompt in prompts:
            # SGLang refuses a prompt that fills its context, and keeps a few tokens to itself.
            if len(prompt.token_ids) + sampling.max_new_tokens > self._context_length:
                raise DataError(
                    f"prompt {prompt.id!r} has {len(prompt.token_ids)} tokens; with {sampling.max_new_tokens} new ones "
                    f"it exceeds the servers' {self._context_length}; shorten it, lower max_new_tokens, or start the "
                    "servers with a larger context length"
                )
        counts = [len(numbers) for numbers in request.wanted]
        with self.activity.task("answers", total=sum(counts)) as advance:
            return self._sampler.generate(
                prompts, counts, sampling, since=version, advance=advance, finished=request.finished
            )

    def score(self, prompt: Prompt, response: Sequence[int]) -> dict[str, tuple[float, ...]]:
        """Log-probs of ``response`` at temperature 1, as each server has them, by URL. Raises RolloutError.

        As of ``Sampler``, which says which servers are waited for.
        """
        return self._sampler.score(prompt, response)

    def close(self) -> None:
        """End what is being generated, close the connections, stop own servers and remove the spooled weights.

        A ``generate`` that another thread is in raises RolloutError there, or CancelledError. May be called again.
        """
        if self._closed:
            return
        self._closed = True
        self._returns.stop()
        self._sampler.close()
        self._weights.close()
        for client in {*self._clients, *self._routed}:
            client.close()
        if self._servers is not None:
            self._servers.stop()
        self._weights.remove()


def _request_format(model_folder: Path, shape: Qwen3VLShape, end_token_ids: Sequence[int]) -> RequestFormat:
    """How prompts of this model are asked about, and which of its tokens are never answers."""
    return RequestFormat(
        ImagePreprocessor.from_folder(model_folder),
        image_token_id=shape.image_token_id,
        end_token_ids=end_token_ids,
        never_sampled=[shape.image_token_id, shape.video_token_id],
    )


def _routed(clients: tuple[ServerClient, ...], options: SGLangOptions, api_key: str | None) -> tuple[ServerClient, ...]:
    """Who is asked for answers: the servers themselves, or the router before them. Raises as ``attach_router``."""
    if options.router is None:
        return clients
    router = ServerClient(options.router, api_key=api_key, patience=options.patience)
    attach_router(router)
    return (router,)
