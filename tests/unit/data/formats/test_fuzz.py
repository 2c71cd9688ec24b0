"""Damaged records and shards: each is read, skipped with a count, or one named error; never anything else.

``PRISM_FUZZ_CASES=10000`` tries more of them than the few hundred that stand here.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.formats import FormatConfig
from prism_megatron.data.formats.detect import open_corpus
from prism_megatron.data.formats.pictures import decoded, extension_of
from prism_megatron.data.formats.walk import walk
from prism_megatron.errors import DataError, PrismError
from tests.conftest import SEED
from tests.unit.data.formats.sets import WRITERS, records_of, synthetic

FORMATS = ("ours", *WRITERS)
CASES = int(os.environ.get("PRISM_FUZZ_CASES", "300"))
AWKWARD: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 10**400, "", " ", "\ud800", "\0", "<image>", "<image><image>", "../x", "/etc/hostname",
    "http://x/y.png", "images", [], {}, [[]], [None], ["a", 1], {"role": "user"}, {"bytes": None, "path": None}, [{}],
    "x" * 5000, [{"role": "user", "content": "a"}], [{"type": "image"}], "<caption>", "</think>",
)  # fmt: skip
PIECES = (
    b"", b"\0", b"\xff", b"\n", b"\r\n", b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u", b"<image>", b"null",
    b"NaN", b"-", b"1e999", b"../", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"0" * 600, b"PAR1", b"7" * 11, b"ustar\0",
)  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The path of a small good set of every format."""
    folder = tmp_path_factory.mktemp("good")
    ours = synthetic(folder / "ours", count=6)
    paths = {"ours": ours}
    for name, write in WRITERS.items():
        (folder / name).mkdir()
        paths[name] = write(records_of(ours), folder / name)
    return paths


@pytest.mark.parametrize("name", FORMATS)
def test_damage_is_read_skipped_or_one_named_error(name: str, sets: dict[str, Path], tmp_path: Path) -> None:
    """Blind spot: damage beyond the seeds that are tried."""
    outcomes: Counter[str] = Counter()
    for case in range(CASES // len(FORMATS)):
        draw = random.Random(f"{SEED} {name} {case}")
        copy = tmp_path / "copy"
        path = _copied(sets[name], copy)
        files = sorted(file for file in copy.rglob("*") if file.is_file())
        texts = [file for file in files if file.suffix not in (".png", ".jpg")]
        for _ in range(draw.choice((1, 1, 2, 5))):
            victim = draw.choice(texts if draw.random() < 0.7 else files)
            victim.write_bytes(_mutation(victim, draw)(victim.read_bytes(), draw))
        for outcome in _outcomes(path, draw.choice((None, name.partition(" ")[0])), plain=draw.random() < 0.5):
            outcomes[outcome] += 1
        shutil.rmtree(copy)
    print(name, dict(outcomes))
    assert not outcomes["nameless"]
    assert outcomes["read"] and outcomes["record"], f"blind: {outcomes}"


def _copied(path: Path, copy: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    shutil.copytree(folder, copy)
    return copy / path.relative_to(folder)


def _outcomes(path: Path, fixed: Any, *, plain: bool) -> list[str]:
    """What became of each record; any exception but ours is one that pytest sees."""
    outcomes = []
    try:
        corpus = open_corpus(path, FormatConfig(format=fixed, plain_answers=plain), purpose="train")
        for where, found in walk(corpus):
            if isinstance(found, DataError):
                assert str(path.parent) in str(found) and "\n" not in where, found
                outcomes.append("record")
                continue
            try:
                for picture in found.pictures:
                    extension_of(picture, where=where)
                    decoded(picture, where=where)
            except DataError as error:
                outcomes.append("image" if where in str(error) else "nameless")
            else:
                json.dumps([found.id, found.source, [str(turn.parts) for turn in found.turns]]).encode()
                outcomes.append("read")
    except PrismError as error:
        outcomes.append("set" if str(error) else "nameless")
    return outcomes


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
        holder[key] = draw.choice(AWKWARD)
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
    return data[:spot] + draw.choice(PIECES) + data[spot:]


def _double(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data) + 1)
    stop = min(len(data), start + draw.choice((1, 20, 512, 4000)))
    return data[:stop] + data[start:]


def _swap(data: bytes, draw: random.Random) -> bytes:
    """Numbers in headers and footers become large, small or negative."""
    spot = draw.randrange(len(data) + 1)
    piece = draw.choice((b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 3, b"\x80" + b"\0" * 7, b"77777777777\0", b"-1"))
    return data[:spot] + piece + data[spot + len(piece) :]
