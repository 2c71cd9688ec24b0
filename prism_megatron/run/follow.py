"""Reads ``metrics.jsonl`` while a run writes it, from another process or host."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import takewhile
from pathlib import Path

from prism_megatron.observability.metrics import Row, parse_row
from prism_megatron.observability.summary import step_seconds


@dataclass(frozen=True)
class News:
    """What has come since the last look."""

    rows: Sequence[Row]
    """those that were not there"""
    after: int | None = None
    """where the file was written anew, as by a run that goes on: the steps of the rows that are as they were"""
    dropped: int = 0
    """the rows seen so far that it has no more"""


@dataclass(eq=False)
class RowReader:
    """Follows one file. A last line without its newline waits until it is whole."""

    path: Path
    _lines: list[bytes] = field(default_factory=list)
    _inode: int | None = None
    _offset: int = 0

    def news(self) -> News:
        """What is new since the last call; nothing where there is no file yet. Raises DataError for a damaged line."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return News(())
        with file:
            # A run that goes on puts another file in its place; the same rows may stand at its beginning.
            status = os.fstat(file.fileno())
            is_new = self._inode is not None and (status.st_ino != self._inode or status.st_size < self._offset)
            self._inode = status.st_ino
            if is_new:
                self._offset = 0
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        lines = whole.split(b"\n") if newline else []
        self._offset += len(whole) + len(newline)
        after: int | None = None
        dropped = 0
        if is_new:
            pairs = zip(self._lines, lines, strict=False)
            kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            dropped = len(self._lines) - kept
            after = int(parse_row(lines[kept - 1], where=str(self.path))["step"]) + 1 if kept else 0
            del self._lines[kept:]
            lines = lines[kept:]
        first = len(self._lines) + 1
        rows = [parse_row(line, where=f"{self.path}, line {first + i}") for i, line in enumerate(lines)]
        self._lines += lines
        return News(rows, after, dropped)


@dataclass(eq=False)
class RowClock:
    """The time at which the newest row was written, so that a table that is read later tells the same time left."""

    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds

    def move_to(self, row: Row) -> None:
        """Rows of before there were times are taken to follow each other at once."""
        text = row.get("time")
        if isinstance(text, str):
            self.seconds = datetime.fromisoformat(text).timestamp()
        else:
            self.seconds += step_seconds(row) or 0.0


def follow(
    reader: RowReader,
    *,
    show: Callable[[Row], None],
    say: Callable[[str], None],
    ended: Callable[[], str | None],
    wait: Callable[[], None],
) -> None:
    """Show every row as it comes, until ``ended()`` says how the run ended and all rows are shown."""
    last: int | None = None
    while True:
        over = ended()
        news = reader.news()
        if news.after is not None:
            say(f"the run goes on after step {news.after}{_again(news.dropped)}")
        for row in news.rows:
            show(row)
            last = int(row["step"] or 0) + 1
        if over is not None:
            say(f"the run has ended after {last or 0} steps: {over}")
            return
        wait()


def _again(dropped: int) -> str:
    if dropped == 0:
        return ""
    return (
        ": 1 row is dropped, and its step is played again"
        if dropped == 1
        else (f": {dropped} rows are dropped, and their steps are played again")
    )
