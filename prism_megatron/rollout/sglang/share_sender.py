"""One process's share of an update of servers that several processes make together.

The process that opened the update keeps the last of its own pieces back: once all others have sent theirs, it goes out
with the version (``WeightSync.finish``). So no server reports a version of which it lacks a part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from prism_megatron.conversion.announced_weights import WeightShare
from prism_megatron.errors import PrismError
from prism_megatron.rollout.sglang.weights import Transport, WeightSync
from prism_megatron.rollout.spool_writer import SpoolWriter
from prism_megatron.rollout.weight_buckets import Piece, pieces
from prism_megatron.rollout.weight_checks import WeightCheck


@dataclass(frozen=True)
class OpenUpdate:
    """An update that ``servers`` wait for (see ``WeightSync.open``); its folder has a number, if it ``is_written``."""

    version: int
    servers: Mapping[str, str]
    number: int
    is_written: bool


@dataclass(frozen=True)
class Sent:
    """What one process's share of an update came to."""

    part: int
    """number of the process, by which its files are told apart"""
    num_tensors: int = 0
    num_bytes: int = 0
    """of these tensors, each counted once, to however many servers they went"""
    wrote: bool = False
    """whether the share has files in the folder of the update, or will have"""
    lost: tuple[str, ...] = ()
    """servers that were lost on the way"""
    problem: str | None = None


class ShareSender:
    """Takes this process's shares to the servers of open updates, and into their folders."""

    def __init__(
        self, sync: WeightSync, model: WeightCheck, writer: SpoolWriter, *, transport: Transport, bucket_bytes: int
    ) -> None:
        self._sync = sync
        self._model = model
        self._writer = writer
        self._transport = transport
        self._bucket_bytes = bucket_bytes
        self._num_bytes = 0
        self.kept_back: Piece | None = None
        """the last piece of the newest share, where that was to be kept"""

    def send(self, update: OpenUpdate, share: WeightShare, *, part: int, keeps_last: bool) -> Sent:
        """Send what ``share`` brings; what goes wrong is told in the answer.

        The share is iterated to its end in any case: other ranks would wait for ever in a gather that one left early.
        """
        self.kept_back = None
        try:
            lost = self._send(update, share, part=part, keeps_last=keeps_last)
        except PrismError as error:
            return Sent(part, problem=str(error))
        finally:
            deque(share, maxlen=0)
        wrote = update.is_written and bool(share.own_shapes or share.own_left_out)
        return Sent(part, len(share.own_shapes), self._num_bytes, wrote, lost)

    def _send(self, update: OpenUpdate, share: WeightShare, *, part: int, keeps_last: bool) -> tuple[str, ...]:
        self._num_bytes = 0
        if not share.own_shapes and not share.own_left_out:
            return ()
        if update.is_written:
            self._writer.begin(update.number, part, left_out=share.own_left_out)
        lost: tuple[str, ...] = ()
        passing = self._passing(share, writes=update.is_written)
        if self._transport == "disk":
            deque(passing, maxlen=0)
        else:
            lost = self._sync.send(update.servers, self._all_but_last(passing) if keeps_last else passing)
        if update.is_written:
            self._writer.finish()
        if self._transport == "disk":
            self._writer.wait()
        return lost

    def _passing(self, share: WeightShare, *, writes: bool) -> Iterator[Piece]:
        """The share in pieces, none of which ends the update; each is given to the writer on its way."""
        others = self._model.shapes.keys() - share.own_shapes.keys()
        checked = self._model.passed(share, left_out=others)
        for piece in pieces(checked, self._bucket_bytes, count=len(share.own_shapes)):
            self._num_bytes += piece.num_bytes
            if writes:
                self._writer.add(piece.tensors)
            yield replace(piece, is_last=False)

    def _all_but_last(self, passing: Iterator[Piece]) -> Iterator[Piece]:
        for piece in passing:
            if self.kept_back is not None:
                yield self.kept_back
            self.kept_back = piece
