"""What a run says: every line goes to standard output and to ``console.log`` in the run's folder."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from prism_megatron.terminal import Terminal


class Console:
    """A place for lines, of any thread. That nobody reads standard output any more ends the printing, not the run.

    Lines of before :meth:`open` wait for the file, and are lost where there is none: a start that is refused changes no
    file. It is written to like a stream, so a ``Progress`` can have it.
    """

    def __init__(self, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream: TextIO | None = sys.stdout if stream is None else stream
        self._clock = clock
        self._lock = threading.RLock()
        self._file: TextIO | None = None
        self._waiting: list[str] | None = []
        self._last = clock()

    @property
    def is_read(self) -> bool:
        """False once a reader of standard output has gone away, as ``head`` does."""
        return self._stream is not None

    @property
    def seconds_silent(self) -> float:
        """Since the last line, or since the beginning."""
        return self._clock() - self._last

    def line(self, text: str) -> None:
        """One line, or several with line ends between them."""
        self.write(f"{text}\n")

    def write(self, text: str) -> None:
        """Part of a line, as a stream takes it."""
        with self._lock:
            self._last = self._clock()
            self._print(text)
            if self._waiting is not None:
                self._waiting.append(text)
            elif self._file is not None:
                self._log(text)

    def keep(self, text: str) -> None:
        """A line for the file alone, where there is one."""
        with self._lock:
            if self._file is not None:
                self._log(f"{text}\n")

    def flush(self) -> None:
        """Nothing: every write is flushed."""

    def open(self, path: Path) -> None:
        """Append to ``path`` from now on, beginning with all that was said so far; where it has lines, one says so.

        A file that cannot be written is said and done without.
        """
        with self._lock:
            waiting, self._waiting = self._waiting or [], None
            try:
                goes_on = path.exists() and path.stat().st_size > 0
                self._file = path.open("a", encoding="utf-8", errors="replace")
            except OSError as error:
                self._print(f"{path} cannot be written: {error.strerror}\n")
                return
            if goes_on:
                self._log("\n=== the run goes on ===\n")
            self._log("".join(waiting))

    def close(self) -> None:
        """Close the file; lines go to standard output alone. May be called again."""
        with self._lock:
            file, self._file, self._waiting = self._file, None, None
            if file is not None:
                with suppress(OSError):
                    file.close()

    def _print(self, text: str) -> None:
        stream = self._stream
        if stream is None:
            return
        encoding = getattr(stream, "encoding", None) or "utf-8"
        try:
            stream.write(text.encode(encoding, errors="replace").decode(encoding))
            stream.flush()
            if isinstance(stream, Terminal) and not stream.is_read:
                self._stream = None
        except (OSError, ValueError):  # a closed pipe, a terminal that is gone, a closed stream
            self._stream = None
            _give_up(stream)

    def _log(self, text: str) -> None:
        assert self._file is not None
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            file, self._file = self._file, None
            with suppress(OSError):
                file.close()
            self._print(f"{file.name} cannot be written any more: {error.strerror}\n")


def _give_up(stream: TextIO) -> None:
    """Send what is left in the stream's buffer, and what others print to it, nowhere: it would be an error there."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
