"""How far a copy is: the figures of a line, and when there is one."""

from __future__ import annotations

import io

import pytest

from prism_megatron.observability.transfer import TransferProgress, format_bytes

MB = 10**6


class Clock:
    """Time that moves when told."""

    now = 50.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that lines are written over in."""

    def isatty(self) -> bool:
        return True


def test_what_an_earlier_run_moved_counts_as_done_and_not_as_speed() -> None:
    """600 of 1,000 MB are there; 100 more take 10 s, so the other 300 take 30 s."""
    stream, clock = io.StringIO(), Clock()
    progress = TransferProgress("copying", total_bytes=1000 * MB, stream=stream, clock=clock)
    progress.skip(600 * MB)
    clock.now += 10
    progress.add(100 * MB)
    assert stream.getvalue() == "copying: 700 MB of 1.0 GB (70 %), 10.0 MB/s, 30 s left\n"
    clock.now += 30
    progress.add(300 * MB)
    progress.finish()
    assert stream.getvalue().splitlines()[-1] == "copying: 400 MB in 40 s, 10.0 MB/s"


@pytest.mark.parametrize(("stream", "seconds"), [(io.StringIO(), 5.0), (Terminal(), 0.2)], ids=["log", "terminal"])
def test_lines_come_no_more_often_than_they_are_read(stream: io.StringIO, seconds: float) -> None:
    """Ten pieces in each interval, over three of them."""
    clock = Clock()
    progress = TransferProgress("copying", total_bytes=100 * MB, stream=stream, clock=clock)
    for _ in range(30):
        clock.now += seconds / 10 * 1.001
        progress.add(MB)
    assert stream.getvalue().count("copying") == 3


def test_nothing_to_copy_is_all_of_it() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = TransferProgress("copying", total_bytes=0, stream=stream, clock=clock)
    clock.now += 5
    progress.add(0)
    progress.finish()
    assert "0 B of 0 B (100 %), 0 B/s, 0 s left" in stream.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (1024, "1.0 KB"),
        (99_400, "99.4 KB"),
        (99_500, "100 KB"),
        (999_499, "999 KB"),
        (999_500, "1.0 MB"),
        (8_900_000_000, "8.9 GB"),
        (1.5e15, "1500.0 TB"),
    ],
)
def test_bytes_are_counted_in_powers_of_1000(count: float, text: str) -> None:
    """And rounded before the unit is chosen: 999.5 KB would be read as 1,000 of them."""
    assert format_bytes(count) == text
