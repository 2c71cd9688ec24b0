"""Several processes on one store, and processes that are killed."""

from __future__ import annotations

import random
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from prism_megatron.curation.storage.store import Store
from tests.conftest import SEED
from tests.unit.curation.asking import call
from tests.unit.curation.mock_teacher import MockTeacher, Script, digest_of, mock_teacher
from tests.waiting import wait_for

REPOSITORY = Path(__file__).resolve().parents[3]
NUM_CALLS = 60
SOME_FAIL = Script({"refused": 0.1, "stumbles": 0.1})


def start(teacher: MockTeacher, path: Path, first: int = 0) -> subprocess.Popen[str]:
    """The program of ``asking.py``."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.unit.curation.asking", teacher.url, str(path), str(first), str(NUM_CALLS)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )


def stored(path: Path) -> set[str]:
    with sqlite3.connect(path) as database:
        found = {key for (key,) in database.execute("SELECT key FROM responses")}
    database.close()
    return found


def has_come(teacher: MockTeacher, count: int) -> bool:
    return len(teacher.log) >= count


def test_two_processes_ask_each_call_once(tmp_path: Path) -> None:
    """Claim: both get all responses, both have a share in the asking, and no request is made twice but those that were
    told to come again."""
    path = tmp_path / "store.sqlite"
    with mock_teacher(SOME_FAIL, seconds=0.05) as teacher:
        both = [start(teacher, path), start(teacher, path)]
        said = [one.communicate(timeout=60.0)[0].splitlines() for one in both]
        assert [one.returncode for one in both] == [0, 0]
        fruitful = Counter(asked.digest for asked in teacher.log if asked.status != 500)
    assert said[0] == said[1] and len(said[0]) == NUM_CALLS
    assert set(fruitful.values()) == {1} and len(fruitful) == NUM_CALLS
    assert [file.name for file in tmp_path.iterdir()] == ["store.sqlite"]


def test_a_kill_costs_no_response_that_was_stored(tmp_path: Path) -> None:
    """Claim: killed again and again at any moment, it goes on: what was stored is not asked for again, what was claimed
    is free, and whatever a process was told of was stored."""
    path, drawn = tmp_path / "store.sqlite", random.Random(SEED)
    digests = {call(problem).key: digest_of(call(problem).body) for problem in range(NUM_CALLS)}
    with mock_teacher(Script({}), seconds=0.02) as teacher:
        for _ in range(3):
            seen = len(teacher.log) + drawn.randrange(1, 12)
            with start(teacher, path) as running:
                wait_for(partial(has_come, teacher, seen))
                running.kill()
                told, _ = running.communicate(timeout=60.0)
            kept = stored(path)
            assert {call(int(problem)).key for problem in re.findall(r"^(\d+) answered$", told, re.MULTILINE)} <= kept
            asked_before = Counter(asked.digest for asked in teacher.log)
            known = {digest: asked_before[digest] for key, digest in digests.items() if key in kept}
            store = Store(path)
            assert not [path for path in tmp_path.glob("*.lock") if store._claimant.token not in path.name]
            store.close()
        last = start(teacher, path)
        told, _ = last.communicate(timeout=60.0)
        assert last.returncode == 0 and len(told.splitlines()) == NUM_CALLS
        asked = Counter(one.digest for one in teacher.log)
        assert known and all(asked[digest] == count for digest, count in known.items())
    assert len(stored(path)) == NUM_CALLS


def test_one_waits_for_what_another_asks_and_takes_over_when_it_dies(tmp_path: Path) -> None:
    """Claim: a call that a living process asks is waited for; once that process is killed it is asked at once."""
    path = tmp_path / "store.sqlite"
    with mock_teacher(Script({"silent": 1.0}), silence_seconds=120.0) as teacher:
        with start(teacher, path) as first:
            wait_for(lambda: len(teacher.log) == 4)  # as many as it has at once
            teacher.script = Script({})
            second = start(teacher, path)
            wait_for(lambda: len(stored(path)) == NUM_CALLS - 4)
            assert len(teacher.log) == NUM_CALLS
            first.kill()
        told, _ = second.communicate(timeout=60.0)
        assert second.returncode == 0 and len(told.splitlines()) == NUM_CALLS
        assert len(teacher.log) == NUM_CALLS + 4
