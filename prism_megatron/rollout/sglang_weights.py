"""A policy's weights on SGLang servers: checked before anything is sent, then on all servers or on none.

A server takes any name it does not know without a word and dies of a wrong shape, so the whole set is first written to
a folder and checked against the model's own (``write_checked``), and sent from there. The folder also is what servers
go back to, and what a restarted one is given.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from prism_megatron.conversion.hf_reader import HFFolder
from prism_megatron.conversion.hf_writer import write_hf_folder
from prism_megatron.errors import RolloutError, WeightSyncError
from prism_megatron.rollout.sglang_http import ServerClient, ServerLostError, ServerRefusedError

Transport = Literal["tensor", "disk"]
"""How weights reach a server: in buckets over HTTP, or as the path of a folder that the server can read too."""

TIED_NAME = "lm_head.weight"
_NUM_NAMES_SHOWN = 4
_UPDATE_SECONDS = 600.0


class LostVersionError(WeightSyncError):
    """The servers no longer hold one known set of weights."""


def write_checked(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    like: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tied: bool,
) -> None:
    """Write ``tensors`` as the model folder ``folder`` if they are exactly those of ``shapes``.

    A ``tied`` model's ``lm_head.weight`` may be left out. Streams as ``write_hf_folder`` does. Raises WeightSyncError
    for an unknown, repeated, misshapen or missing tensor; nothing is written then.
    """
    write_hf_folder(folder, _checked(tensors, shapes, tied=tied), like=like)


def _checked(
    tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], *, tied: bool
) -> Iterator[tuple[str, Tensor]]:
    missing = dict.fromkeys(name for name in shapes if not (tied and name == TIED_NAME))
    seen: set[str] = set()
    for name, tensor in tensors:
        if name not in shapes and not (tied and name == TIED_NAME):
            raise WeightSyncError(f"rollout model has no weight {name!r}; export the policy under Hugging Face names")
        if name in seen:
            raise WeightSyncError(f"weight {name!r} was sent twice; each name may come once per update")
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise WeightSyncError(
                f"weight {name!r} has shape {tuple(tensor.shape)}, the rollout model's is {shapes[name]}; "
                "was a shard sent without being gathered?"
            )
        seen.add(name)
        missing.pop(name, None)
        yield name, tensor
    if missing:
        shown = ", ".join(list(missing)[:_NUM_NAMES_SHOWN]) + (", …" if len(missing) > _NUM_NAMES_SHOWN else "")
        raise WeightSyncError(f"{len(missing)} of {len(shapes)} weights of the rollout model were not sent: {shown}")


def buckets(source: HFFolder, bucket_bytes: int) -> Iterator[str]:
    """The folder's tensors in SGLang's ``flattened_bucket`` form, each bucket serialised for JSON.

    A bucket holds at most ``bucket_bytes`` of tensors, or one tensor that is larger.
    """
    group: list[tuple[str, Tensor]] = []
    size = 0
    for name in source.names():
        tensor = source.get(name)
        if group and size + tensor.nbytes > bucket_bytes:
            yield _serialise(group)
            group, size = [], 0
        group.append((name, tensor))
        size += tensor.nbytes
    if group:
        yield _serialise(group)


def _serialise(group: Sequence[tuple[str, Tensor]]) -> str:
    """Plain pickle: SGLang's own serialiser passes file descriptors, which an unrelated process cannot open.

    The entries of ``metadata`` need only these attributes; all indices count bytes.
    """
    flat = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for _, tensor in group])
    metadata, start = [], 0
    for name, tensor in group:
        end = start + tensor.nbytes
        metadata.append(
            SimpleNamespace(
                name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=end, numel=end - start
            )
        )
        start = end
    return base64.b64encode(pickle.dumps({"flattened_tensor": flat, "metadata": metadata})).decode()


class WeightSync:
    """Hands a folder's weights to servers in two phases.

    First all servers stop generating and open an update; if one of them cannot, none is changed. Then all take the
    weights, report the version, and agree in the checksum of what they hold; if one fails, all go back to ``previous``.
    A server that dies and is replaced by its supervisor stays out: its successor asks for the weights itself.
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        *,
        transport: Transport,
        bucket_bytes: int,
        replace: Callable[[str], bool],
    ) -> None:
        """``replace(url)`` ends a lost server's remains and says whether a new one takes its place."""
        self._clients = tuple(clients)
        self._transport: Transport = transport
        self._bucket_bytes = bucket_bytes
        self._replace = replace
        self._threads = ThreadPoolExecutor(max_workers=max(1, len(clients)), thread_name_prefix="sglang weights")

    def push(self, folder: Path, version: int, *, previous: tuple[Path, int] | None) -> Mapping[str, str]:
        """Give all servers the weights of ``folder``; returns the checksum that each server reports, by URL.

        Raises WeightSyncError when a server failed and all others went back to ``previous`` (or, in the first phase,
        never left it), and LostVersionError when they could not.
        """
        taking, problem = self._begin(self._clients)
        if problem is not None:
            self._each(taking, self._release)
            raise WeightSyncError(f"version {version} was not handed over, nothing has changed: {problem}")
        taking, checksums, problem = self._finish(taking, folder, version)
        if problem is None:
            return checksums
        if previous is None:
            self._each(self._clients, self._release)
            raise LostVersionError(f"version {version} was not handed over, and there is no older one: {problem}")
        self._go_back(*previous, problem=problem)
        raise WeightSyncError(f"version {version} was not handed over, all servers have {previous[1]}: {problem}")

    def push_to(self, url: str, folder: Path, version: int) -> None:
        """Give the weights to the one server at ``url``, which has none of ours. Raises WeightSyncError."""
        clients = [client for client in self._clients if client.url == url]
        taking, problem = self._begin(clients)
        if problem is None:
            taking, _, problem = self._finish(taking, folder, version)
        if problem is None and not taking:
            problem = RolloutError("it was lost again")
        if problem is not None:
            self._each(clients, self._release)
            raise WeightSyncError(f"{url} did not take version {version}: {problem}")

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _go_back(self, folder: Path, version: int, *, problem: Exception) -> None:
        self._each(self._clients, self._release)
        taking, second = self._begin(self._clients)
        if second is None:
            _, _, second = self._finish(taking, folder, version)
        if second is not None:
            self._each(self._clients, self._release)
            raise LostVersionError(f"servers could not go back to version {version}: {second} (after: {problem})")

    def _begin(self, clients: Sequence[ServerClient]) -> tuple[list[ServerClient], RolloutError | None]:
        return self._surviving(clients, self._open)

    def _finish(
        self, clients: Sequence[ServerClient], folder: Path, version: int
    ) -> tuple[list[ServerClient], dict[str, str], RolloutError | None]:
        taking = list(clients)
        for body in self._bodies(folder, version):
            send = partial(_send, body=body)
            taking, problem = self._surviving(taking, send)
            if problem is not None:
                return taking, {}, problem
        checksums: dict[str, str] = {}

        def close(client: ServerClient) -> None:
            if self._transport == "tensor":
                client.post("/end_weight_update", {})
            checksums[client.url] = _checked_in(client, version)

        taking, problem = self._surviving(taking, close)
        held = {checksums[client.url] for client in taking}
        if problem is None and len(held) > 1:
            problem = RolloutError(f"the servers hold different weights after the same update: {checksums}")
        if problem is None:
            taking, problem = self._surviving(taking, lambda client: client.post_again("/continue_generation", {}))
        return taking, checksums, problem

    def _bodies(self, folder: Path, version: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """The calls that carry the weights; the last one names the version and drops the caches of the old one."""
        last = {"flush_cache": True, "weight_version": str(version)}
        if self._transport == "disk":
            yield "/update_weights_from_disk", {"model_path": str(folder.resolve()), **last}
            return
        pending: str | None = None
        for bucket in buckets(HFFolder(folder), self._bucket_bytes):
            if pending is not None:
                yield "/update_weights_from_tensor", _bucket_body(pending) | {"flush_cache": False}
            pending = bucket
        assert pending is not None
        yield "/update_weights_from_tensor", _bucket_body(pending) | last

    def _open(self, client: ServerClient) -> None:
        client.post("/pause_generation", {"mode": "retract"})  # running requests wait, and lose their old keys
        if self._transport == "tensor":
            try:
                client.post("/begin_weight_update", {})
            except ServerRefusedError:
                client.post_again("/continue_generation", {})
                raise

    def _release(self, client: ServerClient) -> None:
        """Leave an update half done, as far as the server still can."""
        if self._transport == "tensor":
            with suppress(ServerRefusedError):  # an update that is over already is refused, and that is as well
                client.post("/end_weight_update", {})
        client.post("/continue_generation", {})

    def _surviving(
        self, clients: Sequence[ServerClient], call: Callable[[ServerClient], object]
    ) -> tuple[list[ServerClient], RolloutError | None]:
        """The servers on which ``call`` worked, and the first failure of one that is not simply replaced."""
        outcomes = self._each(clients, call)
        worked = [client for client in clients if outcomes[client.url] is None]
        for client in clients:
            error = outcomes[client.url]
            if error is not None and not (isinstance(error, ServerLostError) and self._replace(client.url)):
                return worked, error
        return worked, None

    def _each(
        self, clients: Sequence[ServerClient], call: Callable[[ServerClient], object]
    ) -> dict[str, RolloutError | None]:
        def attempt(client: ServerClient) -> RolloutError | None:
            try:
                call(client)
            except RolloutError as error:
                return error
            return None

        outcomes = self._threads.map(attempt, clients)
        return {client.url: outcome for client, outcome in zip(clients, outcomes, strict=True)}


def _send(client: ServerClient, *, body: tuple[str, dict[str, Any]]) -> None:
    client.post(*body, seconds=_UPDATE_SECONDS)


def _bucket_body(bucket: str) -> dict[str, Any]:
    return {"serialized_named_tensors": [bucket], "load_format": "flattened_bucket"}


def _checked_in(client: ServerClient, version: int) -> str:
    """The checksum of a server's weights. Raises RolloutError if it reports another version than it was given."""
    reported = client.get("/model_info")["weight_version"]
    if reported != str(version):
        raise RolloutError(
            f"{client.url} reports version {reported!r} after taking {version}; does another trainer use it?"
        )
    return str(client.post_again("/weights_checker", {"action": "checksum"})["per_engine_checksum"])
