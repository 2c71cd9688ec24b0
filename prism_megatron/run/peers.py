"""Which rank is gone: the processes of a run know each other, so that the one that is lost can be named."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from prism_megatron.parallel.collectives import all_gather_objects

DYING_SECONDS = 2.0
"""The kernel closes a killed process's connections before it reports the process ended: what breaks by the first is
given this long for the second."""


@dataclass(frozen=True)
class Peer:
    """A rank's process."""

    rank: int
    host: str
    pid: int

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, for a peer of this host."""
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True)
class Peers:
    """All ranks of a world, seen from ``host``."""

    peers: Sequence[Peer]
    host: str

    @classmethod
    def meet(cls, rank: int) -> Peers:
        """Learn of all ranks; all of them call it together."""
        own = Peer(rank, socket.gethostname(), os.getpid())
        return cls(all_gather_objects(own), own.host)

    def gone(self) -> list[Peer]:
        """Those of this host that have ended."""
        return [peer for peer in self.peers if peer.host == self.host and peer.is_gone]

    def wait_for_gone(self, *, seconds: float = DYING_SECONDS) -> list[Peer]:
        """:meth:`gone` once anybody is, or nobody after ``seconds``: for whoever has just lost a connection."""
        deadline = time.monotonic() + seconds
        while not (gone := self.gone()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return gone

    def speaker(self) -> int:
        """The first rank of this host that is left."""
        gone = {peer.rank for peer in self.gone()}
        return min(peer.rank for peer in self.peers if peer.host == self.host and peer.rank not in gone)

    def describe_loss(self) -> str:
        """Who is gone, in words; where nobody of this host is, which hosts there are besides."""
        gone = self.gone()
        if gone:
            ranks = ", ".join(str(peer.rank) for peer in gone)
            return f"rank{'s' if len(gone) > 1 else ''} {ranks} on {self.host} ended without a word"
        others = sorted({peer.host for peer in self.peers if peer.host != self.host})
        where = f"those of {', '.join(others)} no longer answer" if others else "yet one no longer answers"
        return f"all ranks on {self.host} are there, {where}"
