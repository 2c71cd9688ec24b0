"""A folder made in many steps that may be interrupted: it goes on where it stopped, and appears by one rename.

Beside the target ``NAME`` stands the hidden ``.NAME.converting/`` with the unfinished folder and a journal. The journal
begins with a fingerprint of everything that decides the result; each further line is a unit of work whose bytes are
safely on disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from prism_megatron.errors import ConversionError
from prism_megatron.observability.transfer import TransferProgress, format_bytes

_JOURNAL = "journal.jsonl"
_FOLDER = "folder"
_SPARE_BYTES = 64 * 2**20
"""Kept free beside the tensors: file systems need room for their own."""


class Unit(Protocol):
    """A part of the work: the same bytes whenever and by whomever it is done."""

    @property
    def num_bytes(self) -> int:
        """Tensor bytes that it writes."""

    def run(self, folder: Path, count: Callable[[int], None]) -> Any:
        """Do it in ``folder``, flushed to disk; ``count`` hears of written bytes. Returns what JSON can hold."""


def check_target(target: Path, *, source: Path, is_kind: Callable[[Path], bool], kind: str, overwrite: bool) -> None:
    """Raise ConversionError unless ``target`` is apart from ``source`` and free, or is ``kind`` and may be replaced."""
    there, read = target.resolve(), source.resolve()
    if there == read:
        raise ConversionError(f"--save {target} is the folder that is read; name another")
    if there.is_relative_to(read) or read.is_relative_to(there):
        raise ConversionError(
            f"--save {target} and the folder that is read, {source}, lie one in the other; name another"
        )
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink() or not is_kind(target):
        raise ConversionError(f"--save {target} exists and is no {kind}; choose another place")
    if not overwrite:
        raise ConversionError(f"--save {target} is a finished {kind} already; name another, or give --overwrite")


def fingerprint_of(folder: Path, extra: Sequence[Path] = ()) -> list[list[Any]]:
    """Names, sizes and times of the files in ``folder`` and ``extra`` folders."""
    files = [path for place in (folder, *extra) for path in place.iterdir() if path.is_file()]
    stats = {str(path.relative_to(folder)): path.stat() for path in files}
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in sorted(stats.items())]


class WorkFolder:
    """The unfinished folder and its journal, at work inside ``with``, which says of OSErrors what to do about them.

    ``fingerprint`` is JSON-able; work done under another one is dropped.
    """

    def __init__(
        self, target: Path, fingerprint: Mapping[str, Any], *, overwrite: bool, say: Callable[[str], None]
    ) -> None:
        """Raises ConversionError where another process is at work on the same target, or nothing can be written."""
        self.target = target
        self.hidden = target.with_name(f".{target.name}.converting")
        self.folder = self.hidden / _FOLDER
        self.done: dict[int, Any] = {}
        self._replaced = self.hidden / "replaced"
        self._overwrite = overwrite
        for path in (self.hidden, self.hidden / _JOURNAL, self.folder):
            if path.is_symlink():
                raise ConversionError(f"{path} is a link, and what it leads to would be overwritten; remove it")
        with _explained(target):
            self.hidden.mkdir(parents=True, exist_ok=True)
            self._journal = (self.hidden / _JOURNAL).open("a+", encoding="utf-8", errors="surrogateescape")
            try:
                self._begin(json.dumps(fingerprint, sort_keys=True), say)
            except BaseException:
                self._journal.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let another process go on."""
        self._journal.close()
        if isinstance(error, OSError):
            with _explained(self.target):
                raise error

    def _begin(self, expected: str, say: Callable[[str], None]) -> None:
        """Take the lock, then what an earlier run has left."""
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConversionError(f"another process is converting to {self.target}; wait for it") from error
        if os.fstat(self._journal.fileno()).st_nlink == 0:
            raise ConversionError(f"another process has just converted to {self.target}")
        if self._replaced.exists() and self.target.exists():  # killed when all was done but the removal
            shutil.rmtree(self._replaced)
        found, whole_bytes = self._read()
        if found == expected and self.folder.is_dir():
            self._journal.truncate(whole_bytes)
            if self.done:
                say(f"going on where an earlier conversion to {self.target} stopped: {len(self.done)} units are done")
            return
        if found is not None:
            say(f"an earlier conversion to {self.target} had another source or other flags; starting over")
        self._start_over(expected)

    def _read(self) -> tuple[str | None, int]:
        """The fingerprint, and the length of the lines that were written whole; fills ``done``."""
        self._journal.seek(0)
        head: str | None = None
        whole_bytes = 0
        for line in self._journal:
            if not line.endswith("\n"):
                break
            try:
                entry = json.loads(line)
                if head is None:
                    head = json.dumps(entry["fingerprint"], sort_keys=True)
                else:
                    self.done[entry["unit"]] = entry["result"]
            except (ValueError, KeyError, TypeError, RecursionError):
                break
            whole_bytes += len(line.encode(errors="surrogateescape"))
        return head, whole_bytes

    def _start_over(self, fingerprint: str) -> None:
        self.done = {}
        self._journal.truncate(0)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self._append(f'{{"fingerprint": {fingerprint}}}')
        flush(self.hidden)

    def record(self, unit: int, result: Any) -> None:
        """Note that the bytes of a unit are on disk."""
        self.done[unit] = result
        self._append(json.dumps({"unit": unit, "result": result}))

    def _append(self, line: str) -> None:
        self._journal.write(line + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def publish(self) -> None:
        """Make the folder the target, by one rename; an older target steps aside first. The work folder goes.

        Raises ConversionError for a target that has appeared since and may not be replaced.
        """
        for path in [*self.folder.rglob("*"), self.folder]:
            flush(path)
        if self.target.exists():
            if not self._overwrite:
                raise ConversionError(f"--save {self.target} has appeared meanwhile; remove it, or give --overwrite")
            self.target.rename(self._replaced)
        self.folder.rename(self.target)
        flush(self.target.parent)
        shutil.rmtree(self.hidden)


def run_units(units: Sequence[Unit], work: WorkFolder, *, workers: int, label: str) -> list[Any]:
    """Do what is left of ``units`` on so many threads; returns the results of all, in order.

    Raises ConversionError for a disk that is too small, and whatever a unit raises; units that were done stay noted, so
    that the same command goes on there.
    """
    left = [number for number in range(len(units)) if number not in work.done]
    total = sum(unit.num_bytes for unit in units)
    check_space(work.folder, sum(units[number].num_bytes for number in left))
    progress = TransferProgress(label, total_bytes=total)
    progress.skip(total - sum(units[number].num_bytes for number in left))
    pool = ThreadPoolExecutor(max_workers=workers)
    running = {pool.submit(units[number].run, work.folder, progress.add): number for number in left}
    failures: list[BaseException] = []
    try:
        # Units that were running when one failed are done and noted too.
        for future in as_completed(running):
            if future.cancelled():
                continue
            if error := future.exception():
                failures.append(error)
                for other in running:
                    other.cancel()
            else:
                work.record(running[future], future.result())
        if failures:
            raise failures[0]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    progress.finish()
    return [work.done[number] for number in range(len(units))]


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Raises OSErrors as ConversionError. A disk that fills is found by any of many calls."""
    try:
        yield
    except OSError as error:
        raise ConversionError(
            f"converting to {target} failed ({error}); make room, or choose another place, and run the same command "
            "again: it goes on where it stopped"
        ) from error


def check_space(folder: Path, needed: int) -> None:
    """Raise ConversionError where the disk of the work folder ``folder`` is too small for ``needed`` bytes more."""
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise ConversionError(
            f"the disk of {folder} has {format_bytes(free)} free, but {format_bytes(needed)} are to be "
            f"written (and {format_bytes(_SPARE_BYTES)} kept spare); make room or choose another --save"
        )


def flush(path: Path) -> None:
    """Make a file, or the entries of a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
