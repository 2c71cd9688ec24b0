"""Sets of every format with damaged records, shards and metadata, read as ``prism-data check`` and runs read them."""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from prism_megatron.config.formats import FormatConfig
from prism_megatron.data.formats.detect import open_corpus
from prism_megatron.data.formats.files.walk import walk
from prism_megatron.data.formats.pictures import decoded, extension_of
from prism_megatron.errors import DataError, PrismError
from tests.fuzz.harness import MIB, SECONDS_A_CASE, WARM_UP_SHARE
from tests.unit.data.formats.sets import WRITERS, records_of, synthetic

FORMATS = ("ours", *WRITERS)
_AWKWARD: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 10**400, "", " ", "\ud800", "\0", "<image>", "<image><image>", "../x", "/etc/hostname",
    "http://x/y.png", "images", [], {}, [[]], [None], ["a", 1], {"role": "user"}, {"bytes": None, "path": None}, [{}],
    "x" * 5000, [{"role": "user", "content": "a"}], [{"type": "image"}], "<caption>", "</think>",
)  # fmt: skip
_PIECES = (
    b"", b"\0", b"\xff", b"\n", b"\r\n", b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u", b"<image>", b"null",
    b"NaN", b"-", b"1e999", b"../", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"0" * 600, b"PAR1", b"7" * 11, b"ustar\0",
)  # fmt: skip


@dataclass
class Tally:
    """What became of damaged sets of one format, and of the records in them."""

    sets: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """records that were ``read``, those left out for their ``record`` or their ``image``, and sets that were one error
    (``set``)"""
    failures: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0
    """of this process's own time: others that share the machine do not count"""
    rss_first_mib: float = 0.0
    """after the warm-up, a tenth of the sets"""
    rss_last_mib: float = 0.0
    rss_peak_mib: float = 0.0
    """of the process, at any time"""

    @property
    def text(self) -> str:
        """One line of figures."""
        found = self.outcomes
        return (
            f"{self.sets} damaged sets: {found['read']} records read, {found['record']} skipped for their text, "
            f"{found['image']} for an image, {found['set']} sets refused by one error, {len(self.failures)} failures, "
            f"slowest {self.slowest_seconds:.2f} s, RSS {self.rss_first_mib:.0f} MiB first, {self.rss_last_mib:.0f} "
            f"MiB last, {self.rss_peak_mib:.0f} MiB at most"
        )


def good_set(name: str, folder: Path) -> Path:
    """A small good set of a format; the path that names it."""
    ours = synthetic(folder / "ours", count=6)
    if name == "ours":
        return ours
    (folder / "theirs").mkdir()
    return WRITERS[name](records_of(ours), folder / "theirs")


def fuzz_sets(name: str, count: int, *, seed: int, folder: Path, on_case: Callable[[int], None] | None = None) -> Tally:
    """``count`` damaged copies of a good set; case number i is the same for one seed, whatever came before it."""
    good, copy, tally, process = good_set(name, folder), folder / "copy", Tally(), psutil.Process()
    for number in range(count):
        if number == int(count * WARM_UP_SHARE):
            tally.rss_first_mib = process.memory_info().rss / MIB
        if on_case is not None:
            on_case(number)
        draw = random.Random(f"{seed} {name} {number}")
        path = _damaged_copy(good, copy, draw)
        format_name = draw.choice((None, name.partition(" ")[0]))
        config = FormatConfig(format=format_name, plain_answers=draw.random() < 0.5)  # type: ignore[arg-type]
        started = time.process_time()
        try:
            tally.outcomes.update(_outcomes(path, config))
        except Exception:  # noqa: BLE001  # anything but our errors is what is looked for
            tally.failures.append(f"{name} {number}: {traceback.format_exc(limit=-2)}")
        seconds = time.process_time() - started
        tally.slowest_seconds = max(tally.slowest_seconds, seconds)
        if seconds > SECONDS_A_CASE:
            tally.failures.append(f"{name} {number}: took {seconds:.1f} s")
        tally.sets += 1
        shutil.rmtree(copy)
    tally.rss_peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    tally.rss_last_mib = process.memory_info().rss / MIB
    return tally


def _damaged_copy(good: Path, copy: Path, draw: random.Random) -> Path:
    folder = good if good.is_dir() else good.parent
    shutil.copytree(folder, copy)
    files = sorted(file for file in copy.rglob("*") if file.is_file())
    texts = [file for file in files if file.suffix not in (".png", ".jpg")]
    for _ in range(draw.choice((1, 1, 2, 5))):
        victim = draw.choice(texts if draw.random() < 0.7 else files)
        victim.write_bytes(_mutation(victim, draw)(victim.read_bytes(), draw))
    return copy / good.relative_to(folder)


def _outcomes(path: Path, config: FormatConfig) -> list[str]:
    """What became of each record. An error that does not name what it is about is a failure, and so is any other."""
    outcomes = []
    try:
        for where, found in walk(open_corpus(path, config, purpose="train")):
            if isinstance(found, DataError):
                _check_named(found, str(path.parent))
                outcomes.append("record")
                continue
            try:
                for picture in found.pictures:
                    extension_of(picture, where=where)
                    decoded(picture, where=where)
            except DataError as error:
                _check_named(error, where)
                outcomes.append("image")
            else:
                json.dumps([found.id, found.source, [str(turn.parts) for turn in found.turns]]).encode()
                outcomes.append("read")
    except PrismError as error:
        _check_named(error, str(path.parent))
        outcomes.append("set")
    return outcomes


def _check_named(error: PrismError, where: str) -> None:
    assert where in str(error), f"the error does not name {where}: {error}"


def _mutation(file: Path, draw: random.Random) -> Callable[[bytes, random.Random], bytes]:
    if file.suffix in (".json", ".jsonl") and draw.random() < 0.6:
        return _other_value
    return draw.choice((_flip, _cut, _put, _double, _swap))


def _other_value(data: bytes, draw: random.Random) -> bytes:
    """One value, somewhere in a line or in the whole document, becomes an awkward one."""
    lines = data.split(b"\n")
    spot = draw.randrange(len(lines)) if data.startswith(b"{") else 0
    try:
        document = json.loads(lines[spot] if data.startswith(b"{") else data)
    except ValueError:
        return _flip(data, draw)
    holders: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        value = waiting.pop()
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        holders += [(value, key) for key in keys]
        waiting += [value[key] for key in keys]
    if not holders:
        return data
    holder, key = draw.choice(holders)
    if draw.random() < 0.2:
        del holder[key]
    else:
        holder[key] = draw.choice(_AWKWARD)
    text = json.dumps(document).encode()
    return b"\n".join([*lines[:spot], text, *lines[spot + 1 :]]) if data.startswith(b"{") else text


def _flip(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 3, 30))):
        if changed:
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def _cut(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data) + 1)
    return data[:start] + (data[start + draw.choice((1, 7, 512, 10**9)) :] if draw.random() < 0.5 else b"")


def _put(data: bytes, draw: random.Random) -> bytes:
    spot = draw.randrange(len(data) + 1)
    return data[:spot] + draw.choice(_PIECES) + data[spot:]


def _double(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data) + 1)
    stop = min(len(data), start + draw.choice((1, 20, 512, 4000)))
    return data[:stop] + data[start:]


def _swap(data: bytes, draw: random.Random) -> bytes:
    """Numbers in headers and footers become large, small or negative."""
    spot = draw.randrange(len(data) + 1)
    piece = draw.choice((b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 3, b"\x80" + b"\0" * 7, b"77777777777\0", b"-1"))
    return data[:spot] + piece + data[spot + len(piece) :]
