"""The weights that a set of SGLang servers samples with: which version, where its files are, and how it changes.

All servers have the same version or none is in use. Its files stay on disk: one that was started again is given them,
and servers that cannot take a newer version from one process go back to them.

Where several processes share an update (``open``, ``send``, ``finish``), files are written aside and of every k-th
version only. Servers that fail in one hold parts of two versions: they stay paused until they are given a whole one.
"""

from __future__ import annotations

import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from prism_megatron.conversion.announced_weights import AnnouncedWeights, WeightShare, left_out_of
from prism_megatron.errors import PrismError, RolloutError, WeightSyncError
from prism_megatron.rollout.sglang import memory as sglang_memory
from prism_megatron.rollout.sglang.http import CONNECT_SECONDS, ServerClient
from prism_megatron.rollout.sglang.share_sender import OpenUpdate, Sent, ShareSender
from prism_megatron.rollout.sglang.weights import LostVersionError, Transport, WeightSync
from prism_megatron.rollout.spool_writer import SpoolWriter
from prism_megatron.rollout.weight_buckets import Piece, pieces
from prism_megatron.rollout.weight_checks import WeightCheck
from prism_megatron.rollout.weight_spool import Spool, remove_leftovers, spool_folder


class ServedWeights:
    """Takes versions of a model's weights to its servers, one at a time; threads may call it beside each other."""

    def __init__(
        self,
        clients: Sequence[ServerClient],
        model: WeightCheck,
        *,
        model_folder: Path,
        spool: Path,
        transport: Transport,
        bucket_bytes: int,
        master_address: str | None,
        spool_every: int,
        colocated: bool,
        replace: Callable[[str], bool],
    ) -> None:
        """``model`` is what the servers' model holds, ``model_folder`` that model's. See ``SGLangOptions``.

        ``spool`` is a folder for the newest weights, and for a moment those before them; of shared updates every
        ``spool_every``-th is written. ``replace`` as in ``WeightSync``.
        """
        self._clients = tuple(clients)
        self._model = model
        self._model_folder = model_folder
        self._spool = spool
        self._transport = transport
        self._bucket_bytes = bucket_bytes
        self._colocated = colocated
        self._replace = replace
        self._sync = WeightSync(
            self._clients,
            transport=transport,
            bucket_bytes=bucket_bytes,
            master_address=master_address,
            replace=replace,
        )
        self.version: int | None = None
        """Version of the weights in use; None while there are none."""
        self.newest_version: int | None = None
        """Version that tokens may come with: the one in use, or the one that is being handed over."""
        self._memory: Literal["whole", "released", "of weights"] = "whole"
        self._without_keys: set[str] = set()  # addresses of servers that have no memory for keys and values
        self._held: tuple[Path, int] | None = None
        self._num_updates = 0
        self._spool_every = spool_every
        self._unwritten = spool_every  # versions since the last written one, that one included
        self._writer = SpoolWriter(spool, like=model_folder)
        self._written: Future[None] | None = None  # done when the files in use are whole; None where they were at once
        self._shares_updates = False
        self._left_paused = self._is_open = False
        self._sender = ShareSender(self._sync, model, self._writer, transport=transport, bucket_bytes=bucket_bytes)
        self._lock = threading.Lock()

    @property
    def asleep(self) -> bool:
        """Whether the servers have released memory and cannot answer."""
        return self._memory != "whole"

    def update(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As of ``SGLangRollout.update_weights``. Raises WeightSyncError, as that does."""
        with self._lock:
            left_out = left_out_of(tensors)
            if left_out and self._held is None:
                raise WeightSyncError(f"{len(left_out)} weights are left out and the servers have none; send all first")
            spool = Spool(spool_folder(self._spool, self._num_updates), like=self._model_folder)
            self._num_updates += 1
            self.expect(version)
            try:
                self._take(tensors, version, spool)
            except PrismError as error:
                spool.remove()
                if isinstance(error, LostVersionError):
                    self._hold(None)
                self.newest_version = self.version
                raise
            self._hold((spool.folder, version))
            self._left_paused = False

    def open(self, share: WeightShare, version: int) -> OpenUpdate:
        """Open an update that this process and others share, and ends with ``finish``; nobody else updates meanwhile.

        Raises WeightSyncError; nothing has changed then, unless it is LostVersionError.
        """
        self._lock.acquire()  # until ``finish``
        self._is_open = self._shares_updates = True
        try:
            return self._open(share, version)
        except BaseException as error:
            if isinstance(error, LostVersionError):
                self._lose()
            self.newest_version = self.version
            self._let_others()
            raise

    def send(self, update: OpenUpdate, share: WeightShare, *, part: int, keeps_last: bool) -> Sent:
        """As of ``ShareSender``. ``keeps_last`` is for the process that opened the update."""
        return self._sender.send(update, share, part=part, keeps_last=keeps_last)

    def finish(self, update: OpenUpdate, share: WeightShare, sent: Sequence[Sent]) -> None:
        """End what ``open`` began, when all processes have ``sent`` their shares.

        Raises LostVersionError where one could not, or a server does not have all of them; servers stay paused then.
        """
        try:
            self._finish(update, share, sent)
        except PrismError as error:
            self._lose()
            raise LostVersionError(f"version {update.version} was not handed over, none is in use: {error}") from error
        finally:
            self._let_others()

    def holds_rest(self) -> bool:
        """Whether all servers have the version in use, so that an update may leave out what it does not change."""
        with self._lock:
            return self._hold_the_rest()

    @property
    def lacks_weights(self) -> bool:
        """Whether the servers have let go of the version in use, and ``wake`` would have to read it from the disk."""
        return self._memory == "released" and self.version is not None

    def problem_with_files(self) -> str | None:
        """What went wrong with files that were written aside."""
        return self._writer.problem()

    def expect(self, version: int) -> None:
        """Take note that the servers are about to be given ``version``: answers may come with it from now on."""
        self.newest_version = version

    def follow(self, version: int | None) -> None:
        """Take note that another process has given the servers ``version`` (or that they have none in common)."""
        self.version = self.newest_version = version

    def sleep(self) -> None:
        """As of ``SGLangRollout.sleep``."""
        with self._lock:
            if self._colocated and not self.asleep:
                self._memory = "released"
                self._without_keys = {client.url for client in self._clients}
                sglang_memory.release(self._clients, replace=self._replace)

    def wake(self) -> None:
        """As of ``SGLangRollout.wake``."""
        with self._lock:
            if not self.asleep or self.version is None:
                return
            try:
                if self._memory == "released":
                    self._push(*self._on_disk())
                self._make_whole(self.version)
            except WeightSyncError:
                self._hold(None)
                raise

    def restore(self, url: str) -> None:
        """Give a restarted server the weights in use; it waits for an update that is under way.

        Of a version that was not written it gets nothing: its answers do not count before the next update.
        """
        with self._lock:
            if self._memory == "released":
                sglang_memory.release([client for client in self._clients if client.url == url], replace=self._replace)
            elif self._held is not None:
                self._without_keys.discard(url)  # a new process has all of its memory
                self._sync.push_to(url, *self._on_disk())

    def close(self) -> None:
        """Leave the servers' groups and end the threads. ``remove`` follows once no server can ask for weights."""
        if self._left_paused:
            self._sync.give_up(stays_paused=False)
        if self._is_open:  # the run ends in the middle of an update: nobody must wait for it
            self._let_others()
        self._writer.close()
        self._sync.close()

    def remove(self) -> None:
        """Remove the files; no version is in use any more."""
        if self._shares_updates:
            self._held = self.version = None
            remove_leftovers(self._spool)
        self._hold(None)

    def _open(self, share: WeightShare, version: int) -> OpenUpdate:
        if share.left_out and self.version is None:
            raise WeightSyncError(
                f"{len(share.left_out)} weights are left out and the servers have none; send all first"
            )
        self._model.check_names(share.shapes, left_out=share.left_out)
        self.expect(version)
        waking = self._take_memory(version)
        try:
            servers = self._sync.open(version, stays_paused=self.asleep)
        except WeightSyncError as error:
            if not waking:
                raise
            raise LostVersionError(f"the servers woke without weights: {error}") from error
        number, self._num_updates = self._num_updates, self._num_updates + 1
        is_written = self._transport == "disk" or self._unwritten >= self._spool_every
        return OpenUpdate(version, servers, number, is_written)

    def _let_others(self) -> None:
        self._is_open = False
        self._lock.release()

    def _finish(self, update: OpenUpdate, share: WeightShare, sent: Sequence[Sent]) -> None:
        """Raises PrismError."""
        if problem := next((one.problem for one in sent if one.problem is not None), None):
            raise WeightSyncError(problem)
        num_tensors = sum(one.num_tensors for one in sent)
        if num_tensors != len(share.shapes):
            raise WeightSyncError(f"{num_tensors} of {len(share.shapes)} weights came; is each of one rank?")
        lost = {url for one in sent for url in one.lost}
        for url in lost:
            if not self._replace(url):
                raise WeightSyncError(f"{url} was lost, and nobody starts it again")
        folder, written = spool_folder(self._spool, update.number), None
        if update.is_written:
            written = self._writer.join(update.number, [one.part for one in sent if one.wrote])
        if written is not None and self._transport == "disk":
            written.result()
        last, self._sender.kept_back = self._sender.kept_back, None
        if last is None and self._transport != "disk":
            raise WeightSyncError("the process that opened the update brought no weights of its own to end it with")
        urls = [url for url in update.servers if url not in lost]
        self._sync.finish(urls, folder, update.version, last and replace(last, is_last=True), stays_paused=self.asleep)
        self._left_paused = False
        self._unwritten = 1 if written is not None else self._unwritten + 1
        self._held, self._written = (None if written is None else (folder, update.version)), written
        self.version = self.newest_version = update.version

    def _lose(self) -> None:
        """The servers hold no known version: they end the update and take no requests."""
        self._sync.give_up(stays_paused=True)
        self._sender.kept_back = self._held = self.version = self.newest_version = None
        self._unwritten, self._left_paused = self._spool_every, True

    def _on_disk(self) -> tuple[Path, int]:
        """The files of the version in use, once they are whole. Raises WeightSyncError where there are none."""
        if self._held is None:
            raise WeightSyncError(f"version {self.version} was not written to the disk; hand it over again")
        if self._written is not None:
            self._written.result()
        return self._held

    def _take(self, tensors: Iterable[tuple[str, Tensor]], version: int, spool: Spool) -> None:
        left_out = left_out_of(tensors)
        count = None
        if isinstance(tensors, AnnouncedWeights):
            self._model.check_names(tensors.shapes, left_out=left_out)
            count = len(tensors.shapes)
        checked = self._model.passed(tensors, left_out=left_out)
        passing = self._spooled(pieces(checked, self._bucket_bytes, count=count), spool, left_out)
        refilling = bool(left_out) and not self._hold_the_rest()
        if count is None or refilling or self._transport == "disk":
            deque(passing, maxlen=0)
            self._push(spool.folder, version)
        else:
            self._push(spool.folder, version, passing)

    def _hold_the_rest(self) -> bool:
        """Whether all servers have what an update leaves out: not if they slept, or were started again unnoticed."""
        if self.asleep:
            return False
        try:
            held = [client.get("/model_info", seconds=CONNECT_SECONDS)["weight_version"] for client in self._clients]
        except RolloutError:
            return False
        return held == [str(self.version)] * len(held)

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
        older, self._held, self._written = self._held, held, None
        self.version = None if held is None else held[1]
        if older is not None:
            shutil.rmtree(older[0])

    def _push(self, folder: Path, version: int, passing: Iterator[Piece] | None = None) -> None:
        """Hand a folder's weights over, to servers asleep as to others. Arguments and errors of ``WeightSync.push``.

        Memory that was released holds nothing when it is back: until a whole update, or one of the weights before, has
        gone through, the servers would sample with garbage under the old version's name.
        """
        waking = self._take_memory(version)
        try:
            self._sync.push(folder, version, previous=self._held, passing=passing, stays_paused=self.asleep)
        except LostVersionError:
            raise
        except WeightSyncError as error:
            if waking:
                self._refill(error)
            raise

    def _take_memory(self, version: int) -> bool:
        """Give servers that released all memory that for weights; whether they had. Raises LostVersionError."""
        if self._memory != "released":
            return False
        self._memory = "of weights"
        try:
            sglang_memory.resume(self._clients, sglang_memory.WEIGHTS, replace=self._replace)
        except RolloutError as error:
            raise LostVersionError(f"version {version} was not handed over: {error}") from error
        return True

    def _make_whole(self, version: int) -> None:
        """Give servers that have their weights the rest of their memory, and let them go on. Raises WeightSyncError."""
        lacking = [client for client in self._clients if client.url in self._without_keys]
        try:
            sglang_memory.resume(lacking, sglang_memory.KEYS_AND_VALUES, replace=self._replace)
            sglang_memory.go_on(lacking, replace=self._replace)
        except RolloutError as error:
            raise WeightSyncError(
                f"the servers have version {version}, and no room to answer with it: {error}"
            ) from error
        self._without_keys.clear()
        self._memory = "whole"

    def _refill(self, problem: WeightSyncError) -> None:
        """Give the servers the weights they had before they slept. Raises LostVersionError."""
        if self._held is None:
            raise LostVersionError(f"the servers woke without weights: {problem}") from problem
        try:
            self._sync.push(*self._held, previous=None, stays_paused=True)
        except WeightSyncError as error:
            raise LostVersionError(f"the servers woke without weights: {error} (after: {problem})") from error
