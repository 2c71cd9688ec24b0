"""Which rank is gone: the processes of a run know each other, so that the one that is lost can be named."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from prism_megatron.parallel.collectives import all_gather_objects
from prism_megatron.parallel.lost_connection import lost_connection
from prism_megatron.run.ending.last_word import LastWord

DYING_SECONDS = 2.0
"""The kernel closes a killed process's connections before it reports the process ended: what breaks by the first is
given this long for the second."""
_FIRST_SPEAKS_SECONDS = 0.5
"""How long other ranks of a host leave it to the first one to speak."""


@dataclass(frozen=True)
class Peer:
    """A rank's process."""

    rank: int
    host: str
    pid: int
    ear: str = ""
    """the address of its ``LastWord``"""

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, for a peer of this host."""
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


@dataclass(frozen=True)
class Loss:
    """Who is gone, in words, and the rank that says so for all that are left on its host."""

    text: str
    speaker: int


@dataclass(frozen=True)
class Peers:
    """All ranks of a world, seen from ``rank`` on ``host``."""

    peers: Sequence[Peer]
    host: str
    rank: int = 0
    word: LastWord | None = None
    """what this rank hears its neighbours by"""

    @classmethod
    def meet(cls, rank: int) -> Peers:
        """Learn of all ranks; all of them call it together. To be closed."""
        word = LastWord()
        own = Peer(rank, socket.gethostname(), os.getpid(), word.address)
        return cls(all_gather_objects(own), own.host, rank, word)

    def close(self) -> None:
        """Hear no last words any more."""
        if self.word is not None:
            self.word.close()

    def loss(self, error: BaseException) -> Loss | None:
        """Who is gone, where ``error`` came of that; None where it has another cause.

        Of this host it is known who has ended; of others only that they no longer answer.
        """
        gone = self.wait_for_gone()
        if (told := self._told()) is not None:
            return told
        if gone:
            return Loss(self._ended(gone), speaker=self.speaker())
        others = sorted({peer.host for peer in self.peers if peer.host != self.host})
        said = lost_connection(error)
        if said is None or not others:
            return None
        return self._speak(
            f"all ranks on {self.host} are there, those of {' or '.join(others)} no longer answer ({said})"
        )

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

    def _speak(self, text: str) -> Loss:
        """Say ``text`` for this host, and have its other ranks know; or find that one of them was faster."""
        if self.rank != self.speaker():
            time.sleep(_FIRST_SPEAKS_SECONDS)
            if (told := self._told()) is not None:
                return told
        if self.word is not None:
            neighbours = (one.ear for one in self.peers if one.host == self.host and one.rank != self.rank)
            self.word.tell(neighbours, self.rank, text)
        return Loss(text, speaker=self.rank)

    def _told(self) -> Loss | None:
        """What a neighbour has said before it went."""
        told = None if self.word is None else self.word.heard()
        return None if told is None else Loss(told[1], speaker=told[0])

    def _ended(self, gone: Sequence[Peer]) -> str:
        ranks = ", ".join(str(peer.rank) for peer in gone)
        return f"rank{'s' if len(gone) > 1 else ''} {ranks} on {self.host} ended without a word"
