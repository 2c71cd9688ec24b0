"""The store of responses: each is there once, for whoever asks, whatever happens to those who wrote it.

Blind spot: a power cut, for which the store relies on SQLite's own promises.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

import pytest

from prism_megatron.curation.calls import Call, Response, user_turn
from prism_megatron.curation.storage.compact import compact_request
from prism_megatron.curation.storage.store import Claim, Store, Totals
from prism_megatron.errors import DiskError, StoreError
from tests.unit.curation.asking import IMAGE, call

REPOSITORY = Path(__file__).resolve().parents[3]
RESPONSE = Response("answered", "four\0 ☃", "stop", 10, 5, 0.25, "http://a/v1", 2)
HOLDER = """
import sys
from pathlib import Path
from prism_megatron.curation.storage.store import Store
store = Store(Path(sys.argv[1]))
print(store.claim(sys.argv[2]).result().name, flush=True)
sys.stdin.read()
"""
FILLER = """
import resource, signal, sys
from pathlib import Path
from prism_megatron.curation.calls import Response
from prism_megatron.curation.storage.store import Store
from prism_megatron.errors import DiskError
from tests.unit.curation.asking import call
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store(Path(sys.argv[1]))
store.put(call(1).key, call(1), Response("answered", "kept")).result()
resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))
for problem in (2, 3):
    try:
        store.put(call(problem).key, call(problem), Response("answered", "x" * 2**20)).result()
    except DiskError as error:
        print(error)
store.close()
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "store.sqlite")
    yield opened
    opened.close()


def put(store: Store, one: Call, response: Response = RESPONSE) -> None:
    assert store.claim(one.key).result() is Claim.OURS
    assert store.put(one.key, one, response).result() == response


def test_a_response_comes_back_as_it_was(store: Store, tmp_path: Path) -> None:
    """Claim: for every later reader, another process or thread; and what it cost is in the totals."""
    assert store.get(call(1).key) is None and store.look(call(1).key) is Claim.FREE
    put(store, call(1))
    put(store, call(1, number=1), Response("refused", "HTTP 400", cost=1e-9))
    other = Store(tmp_path / "store.sqlite")
    for one in (store, other):
        assert one.get(call(1).key) == one.look(call(1).key) == one.claim(call(1).key).result() == RESPONSE
        assert one.totals() == Totals(2, 0.250000001, 10, 5)
    other.close()


def test_the_first_response_stays(store: Store) -> None:
    """Claim: where two were asked in spite of all, both get what came first, and it counts once."""
    put(store, call(1))
    assert store.put(call(1).key, call(1), Response("answered", "late", cost=9.0)).result() == RESPONSE
    assert store.totals().cost == 0.25


def test_a_claim_keeps_others_out_until_it_is_given_up(store: Store, tmp_path: Path) -> None:
    key = call(1).key
    other = Store(tmp_path / "store.sqlite")
    assert store.claim(key).result() is Claim.OURS
    assert other.claim(key).result() is other.look(key) is Claim.THEIRS
    other.release(key).result()
    assert other.look(key) is Claim.THEIRS, "who has not claimed it cannot give it up"
    store.release(key).result()
    assert other.look(key) is Claim.FREE and other.claim(key).result() is Claim.OURS
    other.close()
    assert store.look(key) is Claim.FREE, "a store that is closed claims nothing"


@pytest.mark.parametrize("ends_by", [signal.SIGKILL, signal.SIGTERM])
def test_claims_of_the_dead_are_free_at_once(store: Store, ends_by: signal.Signals) -> None:
    """Claim: and of the living they are not; the dead leave no file behind for long."""
    key = call(1).key
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(store.path), key],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None and holder.stdout.readline() == "OURS\n"
        assert store.claim(key).result() is Claim.THEIRS
        assert len(list(store.path.parent.glob("*.lock"))) == 2
        holder.send_signal(ends_by)
        holder.wait()
    assert store.look(key) is Claim.FREE
    assert store.claim(key).result() is Claim.OURS
    assert len(list(store.path.parent.glob("*.lock"))) == 1


def test_a_forked_child_keeps_no_claim_of_its_parent(store: Store, tmp_path: Path) -> None:
    """Claim: workers that outlive a killed process do not hold what it claimed; and a child may not use the store."""
    context = multiprocessing.get_context("fork")
    go_on, seen = context.Event(), context.Queue()
    child = context.Process(target=_in_child, args=(store, go_on, seen))
    child.start()
    assert seen.get(timeout=30.0) == "AssertionError"
    other = Store(tmp_path / "store.sqlite")
    assert store.claim(call(1).key).result() is Claim.OURS
    store._claimant.let_go()  # as the kernel does when a process is killed
    assert other.claim(call(1).key).result() is Claim.OURS
    other.close()
    go_on.set()
    child.join()


def _in_child(store: Store, go_on: threading.Event, seen: multiprocessing.Queue[str]) -> None:
    try:
        store.get("x")
    except AssertionError as error:
        seen.put(type(error).__name__)
    go_on.wait(30.0)


def test_threads_write_at_once(store: Store) -> None:
    """Claim: nothing is lost, and each response is seen by others only once it is on the disk."""
    problems = range(200)
    writes: list[Future[Response]] = []

    def write(mine: range) -> None:
        for problem in mine:
            store.claim(call(problem).key).result()
            writes.append(store.put(call(problem).key, call(problem), Response("answered", str(problem), cost=0.1)))
            writes[-1].result()
            assert store.get(call(problem).key) is not None

    threads = [threading.Thread(target=write, args=(problems[first::8],)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.get(call(problem).key) for problem in problems] == [
        Response("answered", str(problem), cost=0.1) for problem in problems
    ]
    assert store.totals() == Totals(200, 20.0, 0, 0)


def test_the_request_is_kept_without_its_pictures(store: Store) -> None:
    """Claim: what was asked can be read beside the response; a picture is told by the hash of its file."""
    put(store, call(3, number=7))
    with closing(sqlite3.connect(store.path)) as database:
        (kept,) = database.execute("SELECT role, number, request FROM responses").fetchall()
    assert kept[:2] == ("teacher", 7)
    assert "[problem 3]" in kept[2] and IMAGE not in kept[2]
    assert "sha256:4c4b6a3be1314ab86138bef4314dde022e600960d8689a2c8f8631802d20dab6" in kept[2]


def test_what_is_no_picture_is_kept_as_it_is() -> None:
    """Claim: also text that begins like one stands as a hash at most, and nothing is an error."""
    body = {"messages": [user_turn(["data:text/plain,x", "half of a pair: \ud800"], "data:image/png;base64,%%%")]}
    kept = compact_request(body)
    assert "data:text/plain,x" in kept and "%%%" not in kept and "sha256:" in kept


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    """Claim: a file of another kind, another program's or another version's is named, and left as it is."""
    path = tmp_path / "store.sqlite"
    path.write_text("not a database, but a text of some length " * 30)
    with pytest.raises(StoreError, match=r"store\.sqlite is damaged, or no store .*; move it away"):
        Store(path)
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE cakes (name TEXT)")
    database.close()
    with pytest.raises(StoreError, match=r"another program's database"):
        Store(path)
    path.unlink()
    Store(path).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StoreError, match="a store of version 99"):
        Store(path)


def test_damage_is_told(tmp_path: Path) -> None:
    """Claim: a file that is damaged inside ends with an error that names it, when it is read or written."""
    path = tmp_path / "store.sqlite"
    first = Store(path)
    for problem in range(50):
        put(first, call(problem))
    first.close()
    data = bytearray(path.read_bytes())
    data[4096:] = os.urandom(4096) * (len(data) // 4096 - 1)
    path.write_bytes(data)
    damaged = Store(path)
    with pytest.raises(StoreError, match=r"store\.sqlite is damaged"):
        damaged.get(call(1).key)
    with pytest.raises(StoreError, match=r"store\.sqlite is damaged"):
        damaged.claim(call(1).key).result()
    damaged.close()


def test_a_disk_that_is_full_is_told(tmp_path: Path) -> None:
    """Claim: what did not reach the disk is no response, what did is there; after the first error nothing is written.

    The limit on a file's size stands for the full disk.
    """
    path = tmp_path / "store.sqlite"
    said = subprocess.run(
        [sys.executable, "-c", FILLER, str(path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.splitlines()
    assert len(said) == 2 and all("store.sqlite cannot be written" in line for line in said)
    store = Store(path)
    assert store.get(call(1).key) == Response("answered", "kept") and store.get(call(2).key) is None
    store.close()


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        Store(tmp_path / "file" / "store.sqlite")


def test_nothing_is_left_open(tmp_path: Path) -> None:
    """Claim: a store that is closed leaves one file and no thread, and says that it is closed."""
    before = threading.active_count()
    store = Store(tmp_path / "store.sqlite")
    put(store, call(1))
    store.close()
    store.close()
    assert [path.name for path in tmp_path.iterdir()] == ["store.sqlite"]
    assert threading.active_count() == before
    with pytest.raises(StoreError, match="is closed"):
        store.claim(call(2).key).result()
