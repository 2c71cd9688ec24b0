"""Weights from the trainer to a server's workers through a process group: NCCL between GPUs, gloo between CPUs.

Each server has a group of its own, in which the trainer is rank 0 and the server's workers come after it: a server that
dies in the middle of an update breaks its own group, and no other server waits in a broadcast that never ends. The
groups are made from a store of their own and are strangers to ``torch.distributed``'s default world.

The other side is SGLang 0.5.23's ``/init_weights_update_group`` on torch 2.x: it joins the store at the address it is
given, and puts what backends exchange there under the prefixes that ``_backend_store`` names.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # offered, not in __all__

from prism_megatron.errors import RolloutError
from prism_megatron.rollout.sglang.http import ServerClient
from prism_megatron.rollout.weight_buckets import Piece, flat

_JOIN_SECONDS = 60.0
_POLL_SECONDS = 0.02
_SEND_SECONDS = 120.0


class Parcel:
    """A piece as one broadcast, and what a server must know to take it apart."""

    def __init__(self, piece: Piece) -> None:
        self.raw = flat(piece)
        self.layout: dict[str, Any] = {
            "names": [name for name, _ in piece.tensors],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in piece.tensors],
            "shapes": [list(tensor.shape) for _, tensor in piece.tensors],
            "load_format": "flattened_bucket",
        }


class WeightGroups:
    """The groups of all servers, made when they are first needed. Each server is used by one thread at a time."""

    def __init__(
        self, address: str | None, *, join_seconds: float = _JOIN_SECONDS, send_seconds: float = _SEND_SECONDS
    ) -> None:
        """``address`` is the host name or IP address under which servers reach this process.

        None is, for each server, the address that this host has on the way to it: loopback for one that runs here.

        A worker that lives but takes nothing ends a broadcast after ``send_seconds``.
        """
        self._address = address
        self._join_seconds = join_seconds
        self._send_limit = timedelta(seconds=send_seconds)
        self._groups: dict[str, tuple[str, Any]] = {}
        self._left: list[Any] = []  # kept: the end of a group waits for what is under way in it, up to send_seconds

    def name_of(self, client: ServerClient) -> str:
        """The name of the server's group, another one whenever it was joined anew; empty where there is none."""
        return self._groups[client.url][0] if client.url in self._groups else ""

    def join(self, client: ServerClient) -> None:
        """Make the server's group unless there is one.

        Raises RolloutError, naming host and port, where the server's workers do not come.
        """
        if client.url in self._groups:
            return
        size = 1 + int(client.get("/server_info")["tp_size"])
        address = self._address or _address_towards(client.url)
        name = f"prism-{secrets.token_hex(8)}"  # unique: a server keeps the groups of trainers that died
        limit = timedelta(seconds=self._join_seconds)
        store, port = _store(address, limit)
        request = {
            "master_address": address,
            "master_port": port,
            "rank_offset": 1,
            "world_size": size,
            "group_name": name,
            "backend": "nccl" if torch.cuda.is_available() else "gloo",
        }
        thread = ThreadPoolExecutor(1)
        answer = thread.submit(client.post, "/init_weights_update_group", request, seconds=2 * self._join_seconds)
        thread.shutdown(wait=False)
        unreachable = RolloutError(
            f"the workers of {client.url} did not reach the trainer at {address}:{port} in "
            f"{self._join_seconds:.0f} s; is that address open to them? --rollout-master-address names another"
        )
        deadline = time.monotonic() + self._join_seconds
        while store.num_keys() == 0:  # a worker that joins leaves a key
            if answer.done():
                answer.result()  # what the server says is wrong, or that it is lost
            if time.monotonic() > deadline:
                raise unreachable
            time.sleep(_POLL_SECONDS)
        try:
            group = _make_group(store, name, size, join_limit=limit, send_limit=self._send_limit)
        except RuntimeError as error:
            raise unreachable from error
        answer.result()
        self._groups[client.url] = name, group

    def send(self, client: ServerClient, parcel: Parcel, fields: dict[str, Any], *, seconds: float) -> None:
        """Broadcast a piece to the server's workers, which load it. Raises as ``ServerClient.post``.

        NCCL makes its communicator inside a group's first broadcast and waits there for the workers, which come only
        once they are asked: the request must be able to leave while the broadcast blocks.
        """
        name, group = self._groups[client.url]
        broadcast = _beside(partial(group.broadcast, [parcel.raw], dist.BroadcastOptions()))
        client.post(
            "/update_weights_from_distributed", {**parcel.layout, "group_name": name, **fields}, seconds=seconds
        )
        broadcast.result().wait()

    def leave(self, client: ServerClient) -> None:
        """Forget the server's group, of which nothing is known after a failure; the next ``join`` makes another."""
        found = self._groups.pop(client.url, None)
        if found is not None:
            name, group = found
            self._left.append(group)
            group.abort()  # a broadcast whose workers never came ends, and the thread that is in it
            with suppress(RolloutError):  # it may be gone, and the group with it
                client.post("/destroy_weights_update_group", {"group_name": name})


def _beside(call: Callable[[], Any]) -> Future[Any]:
    """What ``call`` gives or raises, from a thread that keeps no process from ending."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # noqa: BLE001  # raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="broadcasts weights", daemon=True).start()
    return future


def _address_towards(url: str) -> str:
    """The address of this host from which packets to the server at ``url`` leave. Raises RolloutError."""
    parsed = urlsplit(url)
    try:
        family, kind, _, _, place = socket.getaddrinfo(parsed.hostname, parsed.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # of datagrams: nothing is sent
            return str(probe.getsockname()[0])
    except OSError as error:
        raise RolloutError(
            f"this host has no way to {url} ({error}); name an address with --rollout-master-address"
        ) from error


def _store(address: str, limit: timedelta) -> tuple[TCPStore, int]:
    """A store on a free port of this one address: by itself it would listen on all of the host's."""
    try:
        family, _, _, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise RolloutError(
            f"--rollout-master-address {address} is no address ({error}); give one that this host has"
        ) from error
    with socket.socket(family) as listener:
        try:
            listener.bind(place)
        except OSError as error:
            raise RolloutError(
                f"--rollout-master-address {address} is not an address of this host ({error}); give one that it has"
            ) from error
        listener.listen()
        port = listener.getsockname()[1]
        handle = listener.detach()
    store = TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=limit, master_listen_fd=handle)
    return store, port


def _make_group(store: Store, name: str, size: int, *, join_limit: timedelta, send_limit: timedelta) -> Any:
    """Rank 0 of the group, outside of every registry of torch's. Raises RuntimeError where the others do not come."""
    if torch.cuda.is_available():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = send_limit
        return dist.ProcessGroupNCCL(_backend_store(store, name, "cuda"), 0, size, options)
    group = dist.ProcessGroupGloo(_backend_store(store, name, "cpu"), 0, size, join_limit)
    group.set_timeout(send_limit)
    return group


def _backend_store(store: Store, name: str, device: str) -> Store:
    """Where torch's backend looks: the server's prefix, that of ``new_group``, that of the first device it serves."""
    return PrefixStore(f"{device}/", PrefixStore(f"{name}/", PrefixStore(name, store)))
