"""Landmarks of a run: what can be seen of it from outside, in its folder.

A landmark is a name that has come to be there, or the n-th line of a ``.jsonl`` file. They come in nearly the same
order in every run of a setting, at times that differ; a fault that is placed by them is replayed better than one placed
by a clock.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_CLOSED = re.compile(r"(step|damaged-step)_\d+$|earlier-\d+$|weights-\d+$")
"""Folders that come to be by a rename, with all that is in them, and those of many small files."""
POLL_SECONDS = 0.01
START = "start"
"""The landmark that is there from the beginning."""


class Watch:
    """Landmarks below ``folder``, with the seconds after which each was seen.

    A look asks what changed, and reads that alone: the machine is the run's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._began = time.monotonic()
        self._changed: dict[str, tuple[int, int]] = {}
        self.seen: dict[str, float] = {START: 0.0}

    @property
    def seconds(self) -> float:
        """Since the watch began."""
        return time.monotonic() - self._began

    def look(self) -> None:
        """Note what is new."""
        now = self.seconds
        pending = [*{str(self._folder), *self._changed}]
        while pending:
            for name, path in self._news(pending.pop()):
                self.seen.setdefault(name, now)
                if path is not None:
                    pending.append(path)

    def until(self, condition: Callable[[], bool], *, seconds: float) -> bool:
        """Look again and again; whether ``condition()`` came to hold in time."""
        deadline = time.monotonic() + seconds
        while True:
            self.look()
            if condition():
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)

    def _news(self, path: str) -> Iterator[tuple[str, str | None]]:
        """Names in a folder, or of lines of a file, that has changed; beside each that is to be watched, its path."""
        try:
            status = Path(path).stat()
            if self._changed.get(path) == (stamp := (status.st_mtime_ns, status.st_size)):
                return
            self._changed[path] = stamp
            name = os.path.relpath(path, self._folder)
            if not stat.S_ISDIR(status.st_mode):
                lines = Path(path).read_bytes().count(b"\n")
                yield from ((f"{name}#{number}", None) for number in range(1, lines + 1))
                return
            for entry in os.scandir(path):
                is_open = entry.is_dir(follow_symlinks=False) and not _CLOSED.match(entry.name)
                watched = (is_open or entry.name.endswith(".jsonl")) and entry.path not in self._changed
                yield os.path.relpath(entry.path, self._folder), entry.path if watched else None
        except OSError:  # not there yet, or no more
            self._changed.pop(path, None)
