"""Lines reach the terminal and the run's folder, and nothing about either of them ends a run."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prism_megatron.observability.progress import Progress
from prism_megatron.run.console import Console

ROOT = Path(__file__).resolve().parents[3]


def test_lines_of_before_the_folder_was_accepted_come_first(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(stream=stream)
    console.line("checking")
    assert list(tmp_path.iterdir()) == []
    console.open(tmp_path / "console.log")
    console.line("training")
    console.close()
    console.close()
    console.line("after")
    assert (tmp_path / "console.log").read_text() == "checking\ntraining\n"
    assert stream.getvalue() == "checking\ntraining\nafter\n"


def test_a_start_that_is_refused_changes_no_file(tmp_path: Path) -> None:
    console = Console(stream=io.StringIO())
    console.line("checking")
    console.close()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_goes_on_says_so_and_keeps_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    for text in ("first", "second"):
        console = Console(stream=io.StringIO())
        console.line(text)
        console.open(path)
        console.close()
    assert path.read_text() == "first\n\n=== the run goes on ===\nsecond\n"


def test_a_character_that_cannot_be_printed_is_replaced(tmp_path: Path) -> None:
    raw = io.BytesIO()
    console = Console(stream=io.TextIOWrapper(raw, encoding="ascii"))
    console.open(tmp_path / "console.log")
    console.line("16 × 16 \ud800")
    assert raw.getvalue() == b"16 ? 16 ?\n"
    assert (tmp_path / "console.log").read_text(encoding="utf-8") == "16 × 16 ?\n"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_reader_that_goes_away_ends_the_printing_alone(tmp_path: Path, encoding: str) -> None:
    """As with ``| head -1``, in a process of its own: lines that others print, and Python's exit, are no errors."""
    program = (
        "import sys; from pathlib import Path; from prism_megatron.run.console import Console; c = Console()\n"
        "c.open(Path(sys.argv[1])); c.line('one × line'); sys.stdin.read()\n"
        "for number in range(5000): c.line(f'{number} ' * 20)\n"
        "assert not c.is_read; print('a line of somebody else', flush=True); c.line('the end')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "console.log")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "console.log").read_text(encoding="utf-8").endswith("the end\n")


def test_a_log_that_cannot_be_written_is_said_and_done_without(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(stream=stream)
    console.open(tmp_path / "nowhere" / "console.log")
    console.line("goes on")
    first, second = stream.getvalue().splitlines()
    assert first.endswith("console.log cannot be written: No such file or directory")
    assert second == "goes on"


def test_a_full_disk_ends_the_log_alone(tmp_path: Path) -> None:
    class Full(io.StringIO):
        name = "console.log"

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    stream = io.StringIO()
    console = Console(stream=stream)
    console.open(tmp_path / "console.log")
    console._file = Full()
    console.line("one")
    console.line("two")
    assert stream.getvalue() == "one\nconsole.log cannot be written any more: No space left on device\ntwo\n"


def test_a_table_is_plain_lines_without_carriage_returns(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(stream=stream)
    console.open(tmp_path / "console.log")
    progress = Progress(stream=console)
    progress.phase("building")
    progress.row({"step": 0})
    assert "\r" not in stream.getvalue()
    assert (tmp_path / "console.log").read_text() == stream.getvalue()


def test_lines_of_several_threads_stay_whole(tmp_path: Path) -> None:
    console = Console(stream=io.StringIO())
    console.open(tmp_path / "console.log")

    def say(text: str) -> None:
        for _ in range(200):
            console.line(text * 50)

    threads = [threading.Thread(target=say, args=(text,)) for text in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "console.log").read_text().splitlines()
    assert len(lines) == 800
    assert {len(set(line)) for line in lines} == {1}


def test_silence_is_counted_from_the_last_line() -> None:
    now = [5.0]
    console = Console(stream=io.StringIO(), clock=lambda: now[0])
    now[0] = 9.0
    assert console.seconds_silent == 4.0
    console.line("a")
    now[0] = 10.0
    assert console.seconds_silent == 1.0


def test_a_last_line_is_kept_without_being_printed(tmp_path: Path) -> None:
    shown = io.StringIO()
    console = Console(stream=shown)
    console.keep("before there is a file")
    console.open(tmp_path / "console.log")
    console.keep("stopped by SIGTERM")
    console.close()
    assert shown.getvalue() == ""
    assert (tmp_path / "console.log").read_text() == "stopped by SIGTERM\n"
