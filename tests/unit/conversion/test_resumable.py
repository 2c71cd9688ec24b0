"""Interrupted work goes on where it stopped and ends in the same bytes; nothing half-done has the final name."""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from prism_megatron.conversion import resumable
from prism_megatron.conversion.resumable import WorkFolder, check_target, fingerprint_of, run_units
from prism_megatron.errors import ConversionError
from prism_megatron.observability.transfer import TransferProgress, format_bytes
from tests.unit.conversion.disk import record_calls


@dataclass
class Unit:
    """Writes its number into a file of its own; ``fail`` raises instead."""

    number: int
    fail: BaseException | None = None
    num_bytes: int = 10
    runs: list[int] = field(default_factory=list)

    def run(self, folder: Path, count: Callable[[int], None]) -> int:
        if self.fail is not None:
            raise self.fail
        (folder / f"{self.number}.bin").write_bytes(bytes([self.number]) * 10)
        self.runs.append(self.number)
        count(10)
        return self.number * 100


def convert(
    target: Path, units: list[Unit], *, workers: int = 1, fingerprint: str = "a", overwrite: bool = False
) -> tuple[list[int], list[str]]:
    said: list[str] = []
    with WorkFolder(target, {"source": fingerprint}, overwrite=overwrite, say=said.append) as folder:
        results = run_units(units, folder, workers=workers, label="test")
        folder.publish()
    return results, said


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("killed_at", range(4))
@pytest.mark.parametrize("workers", [1, 3])
def test_interrupted_work_goes_on(tmp_path: Path, killed_at: int, workers: int) -> None:
    """Claim: what was noted is not done again, and the folder is that of work that was never interrupted.

    Blind spot: a unit that raises stands for a kill; that SIGKILL leaves no less on disk is the benchmark's.
    """
    expected, _ = convert(tmp_path / "whole", [Unit(number) for number in range(4)])
    units = [Unit(number, KeyboardInterrupt() if number == killed_at else None) for number in range(4)]
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "model", units, workers=workers)
    assert not (tmp_path / "model").exists()
    noted = {int(line.split(":")[1].split(",")[0]) for line in journal(tmp_path).read_text().splitlines()[1:]}
    again = [Unit(number) for number in range(4)]
    results, said = convert(tmp_path / "model", again, workers=workers)
    assert results == expected == [0, 100, 200, 300]
    assert {unit.number for unit in again if unit.runs} == set(range(4)) - noted
    assert bool(said) == bool(noted)
    assert content(tmp_path / "model") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "whole"]


def test_everything_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a power cut at any time leaves no name for bytes that are not there.

    The journal and its folder are flushed before any unit is done, every note as it is made, all files and folders
    before the rename, and the rename after it.
    """
    hidden, target = tmp_path / ".model.converting", tmp_path / "model"
    calls = record_calls(monkeypatch)
    with WorkFolder(target, {"source": "a"}, overwrite=False, say=lambda _: None) as folder:
        assert calls == [f"flush {journal(tmp_path)}", f"flush {hidden}"]
        run_units([Unit(0), Unit(1)], folder, workers=1, label="test")
        assert calls[2:] == [f"flush {journal(tmp_path)}"] * 2
        (folder.folder / "below").mkdir()
        (folder.folder / "below" / "2.bin").write_bytes(b"2")
        calls.clear()
        folder.publish()
    work_folder = hidden / "folder"
    *before, rename, after = calls
    names = ("0.bin", "1.bin", "below", "below/2.bin")
    assert sorted(before) == sorted(f"flush {path}" for path in (work_folder, *(work_folder / name for name in names)))
    assert rename == f"rename {work_folder} to {target}"
    assert after == f"flush {tmp_path}"


def test_who_opened_a_journal_that_is_gone_does_not_start_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a process that comes second, and gets the lock because the first one has just finished and removed the
    journal, leaves what the first one made."""
    lock = resumable.fcntl.flock  # type: ignore[attr-defined]

    def late(file: io.TextIOBase, how: int) -> None:
        lock(file, how)
        journal(tmp_path).unlink()

    monkeypatch.setattr(resumable.fcntl, "flock", late)  # type: ignore[attr-defined]
    with pytest.raises(ConversionError, match="another process has just converted to"):
        convert(tmp_path / "model", [Unit(0)])
    assert not list(journal(tmp_path).parent.iterdir())


def test_units_that_finish_after_a_failure_are_noted(tmp_path: Path) -> None:
    """Claim: what was running when another unit failed is not done again. The slow unit ends only when it has seen that
    the other one failed."""
    failed = threading.Event()

    class Failing(Unit):
        def run(self, folder: Path, count: Callable[[int], None]) -> int:
            failed.set()
            return super().run(folder, count)

    class Slow(Unit):
        def run(self, folder: Path, count: Callable[[int], None]) -> int:
            assert failed.wait(10)
            return super().run(folder, count)

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "model", [Slow(0), Failing(1, KeyboardInterrupt())], workers=2)
    again = [Unit(0), Unit(1)]
    assert convert(tmp_path / "model", again)[0] == [0, 100]
    assert [bool(unit.runs) for unit in again] == [False, True]


def test_a_journal_without_its_folder_is_no_work(tmp_path: Path) -> None:
    interrupted(tmp_path)
    shutil.rmtree(journal(tmp_path).parent / "folder")
    units = [Unit(number) for number in range(3)]
    assert convert(tmp_path / "model", units)[0] == [0, 100, 200]
    assert all(unit.runs for unit in units)


def test_results_stand_in_the_order_of_the_units(tmp_path: Path) -> None:
    """Claim: also where the last unit was done by an earlier run."""
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "model", [Unit(0, KeyboardInterrupt()), Unit(1), Unit(2)], workers=3)
    assert convert(tmp_path / "model", [Unit(0), Unit(1), Unit(2)])[0] == [0, 100, 200]


def test_room_is_asked_for_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a resumed run needs room for the rest, and some to spare."""
    interrupted(tmp_path)
    for free, enough in ((resumable._SPARE_BYTES + 9, False), (resumable._SPARE_BYTES + 10, True)):
        usage = resumable.shutil._ntuple_diskusage(10**9, 0, free)  # type: ignore[attr-defined]
        monkeypatch.setattr(resumable.shutil, "disk_usage", lambda _, usage=usage: usage)  # type: ignore[attr-defined]
        if enough:
            assert convert(tmp_path / "model", [Unit(0), Unit(1), Unit(2)])[0] == [0, 100, 200]
        else:
            with pytest.raises(ConversionError, match="make room or choose another --save"):
                convert(tmp_path / "model", [Unit(0), Unit(1), Unit(2)])


def test_a_file_that_was_written_again_is_another_source(tmp_path: Path) -> None:
    """Claim: names, sizes and times of the files count, and of those in named folders below, but in no others."""
    below = {name: tmp_path / name / "x" for name in ("named", "other")}
    for path in (tmp_path / "x", *below.values()):
        path.parent.mkdir(exist_ok=True)
        path.write_text("abc")
    before = fingerprint_of(tmp_path, [tmp_path / "named"])
    assert [entry[:2] for entry in before] == [["named/x", 3], ["x", 3]]
    for path, counts in ((tmp_path / "x", True), (below["named"], True), (below["other"], False)):
        kept = path.stat()
        os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns + 1))
        assert (fingerprint_of(tmp_path, [tmp_path / "named"]) != before) == counts, path
        os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))


def journal(parent: Path) -> Path:
    return parent / ".model.converting" / "journal.jsonl"


def interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "model", [Unit(0), Unit(1), Unit(2, KeyboardInterrupt())])


def test_other_sources_or_flags_start_over(tmp_path: Path) -> None:
    """Claim: work for another fingerprint is dropped, and that is said."""
    interrupted(tmp_path)
    units = [Unit(number) for number in range(3)]
    _, said = convert(tmp_path / "model", units, fingerprint="b")
    assert "another source or other flags; starting over" in said[0]
    assert all(unit.runs for unit in units)


@pytest.mark.parametrize("tail", ['{"unit": 1, "resu', "[]\n", '{"unit": 2}\n'])
def test_a_torn_line_is_no_work(tmp_path: Path, tail: str) -> None:
    """Claim: a last line that was not written whole counts for nothing, and later lines are read again."""
    interrupted(tmp_path)
    lines = journal(tmp_path).read_text().splitlines(keepends=True)
    journal(tmp_path).write_text("".join(lines[:2]) + tail)
    units = [Unit(0), Unit(1), Unit(2, KeyboardInterrupt())]
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "model", units)
    assert [bool(unit.runs) for unit in units] == [False, True, False]
    last = [Unit(number) for number in range(3)]
    assert convert(tmp_path / "model", last)[0] == [0, 100, 200]
    assert [bool(unit.runs) for unit in last] == [False, False, True]


def test_a_disk_that_fills_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: ENOSPC names the place and what to do; nothing has the final name; with room the work goes on."""
    units = [Unit(0), Unit(1, OSError(errno.ENOSPC, "No space left on device"))]
    with pytest.raises(ConversionError, match=r"No space left on device.*goes on where it stopped"):
        convert(tmp_path / "model", units)
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(resumable.shutil, "disk_usage", lambda _: resumable.shutil._ntuple_diskusage(100, 95, 5))  # type: ignore[attr-defined]
    with pytest.raises(ConversionError, match=r"has 5 B free, but 10 B are to be written"):
        convert(tmp_path / "model", [Unit(0), Unit(1)])
    monkeypatch.undo()
    assert convert(tmp_path / "model", [Unit(0), Unit(1)])[0] == [0, 100]


def test_a_place_that_cannot_be_written_to_is_one_clear_error(tmp_path: Path) -> None:
    """Claim: an error of the file system is explained wherever it comes from, not in units alone."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConversionError, match=r"converting to .*Not a directory"):
        convert(tmp_path / "file" / "model", [Unit(0)])
    with (
        pytest.raises(ConversionError, match=r"No such file or directory.*goes on where it stopped"),
        WorkFolder(tmp_path / "model", {}, overwrite=False, say=lambda _: None) as folder,
    ):
        (folder.folder / "gone").read_bytes()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    def begin() -> WorkFolder:
        return WorkFolder(tmp_path / "model", {}, overwrite=False, say=lambda _: None)

    with begin(), pytest.raises(ConversionError, match="another process is converting to"):
        begin()
    with begin() as folder:
        # Another tool, or a copy by hand: nothing that was not to be replaced is.
        (tmp_path / "model").mkdir()
        with pytest.raises(ConversionError, match="has appeared meanwhile"):
            folder.publish()


@pytest.mark.parametrize("fingerprint", ["a", "b"])
@pytest.mark.parametrize("survived", [0, 1])
def test_a_kill_while_an_older_folder_is_replaced_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int, fingerprint: str
) -> None:
    """Claim: killed before or after the second rename, the old or the new folder is there until the next run is done.

    Whether that has the same flags or others.
    """
    target, units = tmp_path / "model", [Unit(0), Unit(1)]
    convert(target, [Unit(7)])
    rename, rmtree = Path.rename, shutil.rmtree
    renamed: list[Path] = []

    def dying(self: Path, to: Path) -> Path:
        if len(renamed) > survived:
            raise KeyboardInterrupt
        renamed.append(self)
        return rename(self, to)

    def dying_too(path: Path, **_: object) -> None:
        if path.suffix == ".converting":
            raise KeyboardInterrupt
        rmtree(path, ignore_errors=True)

    monkeypatch.setattr(Path, "rename", dying)
    monkeypatch.setattr(resumable.shutil, "rmtree", dying_too)  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        convert(target, units, overwrite=True)
    monkeypatch.undo()
    old = tmp_path / ".model.converting" / "replaced" / "7.bin"
    assert old.exists()
    assert target.exists() == bool(survived)
    with pytest.raises(KeyboardInterrupt):
        convert(target, [Unit(0, KeyboardInterrupt())], fingerprint="c", overwrite=True)
    assert target.exists() or old.exists()
    convert(target, units, fingerprint=fingerprint, overwrite=True)
    assert sorted(content(target)) == ["0.bin", "1.bin"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_stands_at_the_target_is_not_lost(tmp_path: Path) -> None:
    """Claim: only a finished folder of the same kind is replaced, and only when asked."""
    target = tmp_path / "target"

    def check(*, overwrite: bool, source: Path = tmp_path / "source") -> None:
        check_target(
            target, source=source, is_kind=lambda f: (f / "0.bin").is_file(), kind="thing", overwrite=overwrite
        )

    check(overwrite=False)
    target.write_text("mine")
    with pytest.raises(ConversionError, match="exists and is no thing"):
        check(overwrite=True)
    target.unlink()
    target.mkdir()
    with pytest.raises(ConversionError, match="exists and is no thing"):
        check(overwrite=True)
    target.rmdir()
    convert(target, [Unit(0), Unit(1)])
    with pytest.raises(ConversionError, match=r"finished thing already.*--overwrite"):
        check(overwrite=False)
    with pytest.raises(ConversionError, match="is the folder that is read"):
        check(overwrite=True, source=target)
    for source in (target / "hf", tmp_path):
        with pytest.raises(ConversionError, match="lie one in the other"):
            check(overwrite=True, source=source)
    check(overwrite=True)
    convert(target, [Unit(0)], overwrite=True)
    assert list(content(target)) == ["0.bin"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_says_bytes_rate_and_time_left() -> None:
    """Claim: bytes done before count as done but not for the rate; a terminal has one line, a log one in a while."""
    for stream, breaks in ((io.StringIO(), 2), (Terminal(), 1)):
        now = iter([0.0, 1.0, 10.0, 20.0])
        progress = TransferProgress("x", total_bytes=4_000_000, stream=stream, clock=lambda now=now: next(now))  # type: ignore[misc]
        progress.skip(1_000_000)
        progress.add(500_000)
        progress.add(500_000)
        progress.finish()
        text = stream.getvalue()
        assert "x: 2.0 MB of 4.0 MB (50 %), 100 KB/s, 20 s left" in text
        assert "x: 1.0 MB in 20 s, 50.0 KB/s" in text
        assert text.count("\n") == breaks


def test_sizes_are_written_short() -> None:
    assert [format_bytes(n) for n in (0, 999, 1500, 123_456, 8.9e9, 2e15)] == [
        "0 B", "999 B", "1.5 KB", "123 KB", "8.9 GB", "2000.0 TB",
    ]  # fmt: skip
