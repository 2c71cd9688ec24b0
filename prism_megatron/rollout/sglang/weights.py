"""A policy's weights on SGLang servers: on all of them or on none.

They come in pieces, straight from the engine that gathers them or out of a folder (``weight_spool``), and reach a
server over HTTP, through a process group (``weight_group``), as handles of GPU memory (``device_handles``), or as the
path of the folder.

One process hands a whole model over with ``push``. Or several share an update (``share_sender``): one opens it, all
send their pieces, and the one that opened it sends the very last piece, with which the servers take the version.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from prism_megatron.conversion.hf.reader import HFFolder
from prism_megatron.errors import PrismError, RolloutError, WeightSyncError
from prism_megatron.rollout.device_handles import Handles
from prism_megatron.rollout.sglang.http import ServerClient, ServerLostError, ServerRefusedError
from prism_megatron.rollout.sglang.weight_group import Parcel, WeightGroups
from prism_megatron.rollout.weight_buckets import Payload, Piece, pieces

Transport = Literal["tensor", "disk", "group", "ipc"]
"""How weights reach a server: over HTTP, as the path of a folder that it can read too, through a process group, or as
handles of GPU memory on its host."""

_UPDATE_SECONDS = 600.0
Outcome = tuple[list[ServerClient], RolloutError | None]


class LostVersionError(WeightSyncError):
    """The servers no longer hold one known set of weights."""


class WeightSync:
    """Hands weights to servers in two phases.

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
        master_address: str | None,
        replace: Callable[[str], bool],
    ) -> None:
        """``replace(url)`` ends a lost server's remains and says whether a new one takes its place.

        ``master_address`` is where servers reach this process, for ``group`` (see ``WeightGroups``).
        """
        self._clients = tuple(clients)
        self._transport: Transport = transport
        self._groups = WeightGroups(master_address) if transport == "group" else None
        self._beside: dict[str, str] = {}  # the opener's group with each server when this process joined it
        self._bucket_bytes = bucket_bytes
        self._replace = replace
        self._threads = ThreadPoolExecutor(max_workers=max(1, len(clients)), thread_name_prefix="sglang weights")

    def push(
        self,
        folder: Path,
        version: int,
        *,
        previous: tuple[Path, int] | None,
        passing: Iterator[Piece] | None = None,
        stays_paused: bool = False,
    ) -> Mapping[str, str]:
        """Give all servers the weights of ``folder``; returns the checksum that each server reports, by URL.

        ``passing`` are the same weights, or those of them that changed since ``previous``, on their way into the
        folder: each piece is sent while the next one is gathered. ``disk`` cannot take them. Servers that stay paused
        have the weights and take no requests yet. Raises WeightSyncError
        when a server or ``passing`` failed and all others went back to ``previous`` (or, in the first phase, never
        left it), and LostVersionError when they could not.
        """
        release = partial(self._release, stays_paused=stays_paused)
        taking = self._opened(version, stays_paused=stays_paused)
        taking, checksums, failure = self._finish(taking, folder, version, passing, stays_paused=stays_paused)
        if failure is None:
            return checksums
        if previous is None:
            self._each(self._clients, release)
            raise LostVersionError(f"version {version} was not handed over, and there is no older one: {failure}")
        self._go_back(*previous, problem=failure, stays_paused=stays_paused)
        raise WeightSyncError(f"version {version} was not handed over, all servers have {previous[1]}: {failure}")

    def open(self, version: int, *, stays_paused: bool) -> dict[str, str]:
        """Open an update that several processes share.

        Returns the servers that wait for their weights, by URL, with the name of this process's group: one with another
        name than before is another process than before. Raises WeightSyncError where one cannot; nothing has changed
        then.
        """
        taking = self._opened(version, stays_paused=stays_paused)
        return {client.url: "" if self._groups is None else self._groups.name_of(client) for client in taking}

    def send(self, servers: Mapping[str, str], passing: Iterator[Piece]) -> tuple[str, ...]:
        """Send this process's pieces, none of them the last, to ``servers`` that wait for them, as ``open`` gave them.

        Returns the servers lost on the way. Raises WeightSyncError for any other failure of a server, and whatever
        ``passing`` raises.
        """
        taking, problem = self._named(servers), None
        if self._groups is not None:
            taking, problem = self._surviving(taking, partial(self._join_beside, self._groups, servers))
        if problem is None:
            taking, problem = self._send(taking, passing, last={})
        if problem is not None:
            raise WeightSyncError(str(problem))
        return tuple(url for url in servers if url not in {client.url for client in taking})

    def finish(
        self, urls: Sequence[str], folder: Path, version: int, last: Piece | None, *, stays_paused: bool
    ) -> None:
        """End an update into which all others have sent: the ``last`` piece, or with ``disk`` all of ``folder``.

        Raises WeightSyncError where a server does not hold the version then, or another one than the others.
        """
        passing = None if last is None else iter([last])
        _, _, failure = self._finish(self._named(urls), folder, version, passing, stays_paused=stays_paused)
        if failure is not None:
            raise WeightSyncError(str(failure))

    def give_up(self, *, stays_paused: bool) -> None:
        """End an update half done. Servers that do not stay paused go on with whatever they hold."""
        self._each(self._clients, partial(self._release, stays_paused=stays_paused))

    def push_to(self, url: str, folder: Path, version: int) -> None:
        """Give the weights to the one server at ``url``, which has none of ours. Raises WeightSyncError."""
        clients = [client for client in self._clients if client.url == url]
        if self._groups is not None:
            for client in clients:
                self._groups.leave(client)
        taking, problem = self._begin(clients)
        failure: PrismError | None = problem
        if problem is None:
            taking, _, failure = self._finish(taking, folder, version)
        if failure is None and not taking:
            failure = RolloutError("it was lost again")
        if failure is not None:
            self._each(clients, self._release)
            raise WeightSyncError(f"{url} did not take version {version}: {failure}")

    def close(self) -> None:
        """Leave the groups and end the threads."""
        if self._groups is not None:
            self._each(self._clients, self._groups.leave)
        self._threads.shutdown()

    def _go_back(self, folder: Path, version: int, *, problem: PrismError, stays_paused: bool) -> None:
        release = partial(self._release, stays_paused=stays_paused)
        self._each(self._clients, release)
        taking, second = self._begin(self._clients, stays_paused=stays_paused)
        failure: PrismError | None = second
        if second is None:
            _, _, failure = self._finish(taking, folder, version, stays_paused=stays_paused)
        if failure is not None:
            self._each(self._clients, release)
            raise LostVersionError(f"servers could not go back to version {version}: {failure} (after: {problem})")

    def _named(self, urls: Collection[str]) -> list[ServerClient]:
        return [client for client in self._clients if client.url in urls]

    def _join_beside(self, groups: WeightGroups, opener: Mapping[str, str], client: ServerClient) -> None:
        """Join the server, anew where it is no longer the process of which this one is in a group."""
        if groups.name_of(client) == opener[client.url]:
            return  # this process is the opener
        if self._beside.get(client.url, opener[client.url]) != opener[client.url]:
            groups.leave(client)
        groups.join(client)
        self._beside[client.url] = opener[client.url]

    def _opened(self, version: int, *, stays_paused: bool) -> list[ServerClient]:
        """The servers that wait for weights. Raises WeightSyncError where one does not; the others are let go then."""
        taking, problem = self._begin(self._clients, stays_paused=stays_paused)
        if problem is not None:
            self._each(taking, partial(self._release, stays_paused=stays_paused))
            raise WeightSyncError(f"version {version} was not handed over, nothing has changed: {problem}")
        return taking

    def _begin(self, clients: Sequence[ServerClient], *, stays_paused: bool = False) -> Outcome:
        return self._surviving(clients, partial(self._open, stays_paused=stays_paused))

    def _finish(
        self,
        clients: Sequence[ServerClient],
        folder: Path,
        version: int,
        passing: Iterator[Piece] | None = None,
        *,
        stays_paused: bool = False,
    ) -> tuple[list[ServerClient], dict[str, str], PrismError | None]:
        problem: PrismError | None
        try:
            taking, problem = self._hand_over(clients, folder, version, passing)
        except PrismError as error:  # of the weights on their way
            return list(clients), {}, error
        if problem is not None:
            return taking, {}, problem
        checksums: dict[str, str] = {}

        def close(client: ServerClient) -> None:
            if self._transport != "disk":
                client.post("/end_weight_update", {})
            checksums[client.url] = _checked_in(client, version)

        taking, problem = self._surviving(taking, close)
        held = {checksums[client.url] for client in taking}
        if problem is None and len(held) > 1:
            problem = RolloutError(f"the servers hold different weights after the same update: {checksums}")
        if problem is None and not stays_paused:
            taking, problem = self._surviving(taking, lambda client: client.post_again("/continue_generation", {}))
        return taking, checksums, problem

    def _hand_over(
        self, clients: Sequence[ServerClient], folder: Path, version: int, passing: Iterator[Piece] | None
    ) -> Outcome:
        """All pieces to all servers. What ``passing`` raises comes when nothing is under way."""
        last = {"flush_cache": True, "weight_version": str(version)}  # it drops the caches of the old weights
        if self._transport == "disk":
            body = {"model_path": str(folder.resolve()), **last}
            return self._surviving(clients, partial(_load_folder, body=body))
        return self._send(clients, self._read(folder) if passing is None else passing, last=last)

    def _send(self, clients: Sequence[ServerClient], passing: Iterator[Piece], *, last: dict[str, Any]) -> Outcome:
        """Pieces to all servers, each while the next one is gathered. ``last`` goes with the one that is the last."""
        taking = list(clients)
        under_way: _Calls | None = None
        try:
            for piece in passing:
                if piece.num_bytes > self._bucket_bytes and under_way is not None:
                    under_way.wait()  # two such pieces at once would take more than two buckets
                send = self._sender(piece, last if piece.is_last else {"flush_cache": False})
                del piece
                if under_way is not None:
                    taking, problem = self._settled(under_way)
                    if problem is not None:
                        under_way = None
                        return taking, problem
                under_way = self._start(taking, send)
                del send
        finally:
            if under_way is not None:
                under_way.wait()
        return (taking, None) if under_way is None else self._settled(under_way)

    def _read(self, folder: Path) -> Iterator[Piece]:
        source = HFFolder(folder)
        names = source.names()
        return pieces(((name, source.get(name)) for name in names), self._bucket_bytes, count=len(names))

    def _sender(self, piece: Piece, fields: dict[str, Any]) -> Callable[[ServerClient], object]:
        """The call that gives a server the piece."""
        if self._groups is not None:
            return partial(self._groups.send, parcel=Parcel(piece), fields=fields, seconds=_UPDATE_SECONDS)
        if self._transport == "ipc":
            return partial(_post_handles, handles=Handles(piece), fields=fields)
        return partial(_post_payload, payload=Payload(piece), fields=fields)

    def _open(self, client: ServerClient, *, stays_paused: bool) -> None:
        client.post("/pause_generation", {"mode": "retract"})  # running requests wait, and lose their old keys
        if self._transport == "disk":
            return
        try:
            if self._groups is not None:
                self._groups.join(client)
            client.post("/begin_weight_update", {})
        except ServerLostError:
            raise
        except RolloutError:
            if not stays_paused:
                client.post_again("/continue_generation", {})
            raise

    def _release(self, client: ServerClient, *, stays_paused: bool = False) -> None:
        """Leave an update half done, as far as the server still can."""
        if self._transport != "disk":
            with suppress(ServerRefusedError):  # an update that is over already is refused, and that is as well
                client.post("/end_weight_update", {})
        if not stays_paused:
            client.post("/continue_generation", {})

    def _surviving(self, clients: Sequence[ServerClient], call: Callable[[ServerClient], object]) -> Outcome:
        """The servers on which ``call`` worked, and the first failure of one that is not simply replaced."""
        return self._settled(self._start(clients, call))

    def _settled(self, calls: _Calls) -> Outcome:
        outcomes = calls.wait()
        worked = [client for client, error in outcomes if error is None]
        for client, error in outcomes:
            if error is None:
                continue
            if self._groups is not None:
                self._groups.leave(client)
            try:
                if not (isinstance(error, ServerLostError) and self._replace(client.url)):
                    return worked, error
            except RolloutError as unwatched:  # nobody starts it again any more
                return worked, unwatched
        return worked, None

    def _each(self, clients: Sequence[ServerClient], call: Callable[[ServerClient], object]) -> None:
        """Call for all of them; what fails is of no consequence."""
        self._start(clients, call).wait()

    def _start(self, clients: Sequence[ServerClient], call: Callable[[ServerClient], object]) -> _Calls:
        return _Calls([(client, self._threads.submit(_attempt, client, call)) for client in clients])


class _Calls:
    """One call to each of some servers, under way at once."""

    def __init__(self, futures: Sequence[tuple[ServerClient, Future[RolloutError | None]]]) -> None:
        self._futures = futures

    def wait(self) -> list[tuple[ServerClient, RolloutError | None]]:
        """What each came to, once all are done; may be asked again."""
        return [(client, future.result()) for client, future in self._futures]


def _attempt(client: ServerClient, call: Callable[[ServerClient], object]) -> RolloutError | None:
    try:
        call(client)
    except RolloutError as error:
        return error
    return None


def _load_folder(client: ServerClient, *, body: dict[str, Any]) -> None:
    client.post("/update_weights_from_disk", body, seconds=_UPDATE_SECONDS)


def _post_payload(client: ServerClient, *, payload: Payload, fields: dict[str, Any]) -> None:
    client.post_stream("/update_weights_from_tensor", payload.body(fields), seconds=_UPDATE_SECONDS)


def _post_handles(client: ServerClient, *, handles: Handles, fields: dict[str, Any]) -> None:
    num_workers = int(client.get("/server_info")["tp_size"])
    body = handles.body(fields, num_workers=num_workers)
    client.post("/update_weights_from_tensor", body, seconds=_UPDATE_SECONDS)


def _checked_in(client: ServerClient, version: int) -> str:
    """The checksum of a server's weights. Raises RolloutError if it reports another version than it was given."""
    reported = client.get("/model_info")["weight_version"]
    if reported != str(version):
        raise RolloutError(
            f"{client.url} reports version {reported!r} after taking {version}; does another trainer use it?"
        )
    return str(client.post_again("/weights_checker", {"action": "checksum"})["per_engine_checksum"])
