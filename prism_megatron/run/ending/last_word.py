"""A last word between the ranks of one host.

Whoever ends because of another host breaks the connections of its neighbours, which would take that for the cause.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress

_MOST_BYTES = 4096


class LastWord:
    """Where a rank hears its neighbours' last words; Linux only, elsewhere nothing is heard.

    The address is one of the kernel's own (an abstract socket): no file, and it goes with the process.
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self.address = ""
        """what neighbours reach it by; empty where nothing is heard"""
        if sys.platform == "linux":
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._socket.bind("")  # the kernel chooses
            self.address = self._socket.getsockname().decode("ascii")

    def tell(self, addresses: Iterable[str], rank: int, text: str) -> None:
        """Leave ``text`` of ``rank`` with each of the neighbours. One that has ended hears nothing."""
        if self._socket is None:
            return
        word = json.dumps([rank, text[: _MOST_BYTES // 8]]).encode("ascii")
        for address in addresses:
            with suppress(OSError):
                self._socket.sendto(word, address.encode("ascii"))

    def heard(self) -> tuple[int, str] | None:
        """The first word that was left here and not read yet, and whose it is."""
        if self._socket is None:
            return None
        try:
            rank, text = json.loads(self._socket.recv(_MOST_BYTES))
            return int(rank), str(text)
        except (BlockingIOError, ValueError, TypeError):  # nothing there, or nothing that a rank has said
            return None

    def close(self) -> None:
        """Hear no more. May be called again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
