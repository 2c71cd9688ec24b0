"""``prism-curate`` by a policy that ``prism-serve`` serves: it runs, is killed, goes on, and reports."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from prism_megatron.config.merge import to_yaml
from prism_megatron.config.tools.curate import Endpoint, Model, Recipe, Strong
from prism_megatron.config.tools.serve import ServeConfig
from prism_megatron.jobs.serve import API_KEY, serve
from prism_megatron.rollout.sglang.arguments import PYTHON
from tests.sglang.conftest import FOLDER, REPOSITORY
from tests.unit.jobs.test_serve import free_port
from tests.waiting import wait_for

pytest.importorskip("datasketch")

KEY = "a key of this test"
RECORDS = 100


def num_stored(store: Path) -> int:
    """Responses that are in the store; 0 before there is one."""
    if not store.exists():
        return 0
    with sqlite3.connect(store) as database:
        (tables,) = database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'responses'").fetchone()
        return int(database.execute("SELECT count(*) FROM responses").fetchone()[0]) if tables else 0


def curate(recipe: Path, output: Path, *flags: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "prism_megatron", "curate", "--config", str(recipe), "--output", str(output)]
    return subprocess.Popen([*words, *flags], cwd=REPOSITORY)


def test_a_hundred_real_records_by_a_real_server(
    tmp_path: Path, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: of a hundred records of tabmwp every one is decided; after SIGKILL what was stored stays, and a second
    curation over the same store asks nothing and writes the same bytes.

    The mini cannot answer such questions, so hardly any problem survives: blind to what a good teacher's replies come
    to, which ``test_command.py`` shows with one that is made up.
    """
    monkeypatch.setenv(API_KEY, KEY)
    port, stop = free_port(), threading.Event()
    endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", key=API_KEY, at_once=16)
    mini = Model("mini", (endpoint,), max_tokens=48)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        to_yaml(
            Recipe(data=(shared_dir / "data" / "tabmwp",), teacher=mini, strong=(Strong(mini),), attempts=2, best=10)
        )
    )
    out, again = tmp_path / "out", tmp_path / "again"
    store = out / "store.sqlite"
    before_kill: list[int] = []

    def play() -> None:
        first = curate(recipe, out, "--limit", str(RECORDS))
        wait_for(lambda: num_stored(store) >= RECORDS // 2 or first.poll() is not None, seconds=600.0)
        assert first.poll() is None, "it ended before it was killed"
        first.send_signal(signal.SIGKILL)
        first.wait()
        before_kill.append(num_stored(store))
        assert curate(recipe, out, "--limit", str(RECORDS)).wait(timeout=900) == 0

    def say(text: str) -> None:
        if text.startswith("serving"):
            try:
                play()
            finally:
                stop.set()

    serve(
        ServeConfig(
            load=str(FOLDER), name="mini", port=port, sglang_python=REPOSITORY / PYTHON, logs=tmp_path / "logs"
        ),
        say=say,
        stop=stop,
    )
    # The server is gone: what is played now comes from the store.
    stored = num_stored(store)
    assert curate(recipe, again, "--limit", str(RECORDS), "--store", str(store)).wait(timeout=300) == 0
    assert num_stored(store) == stored >= before_kill[0] >= RECORDS // 2
    for name in ("2-select.jsonl", "4-answer.jsonl", "5-split.jsonl"):
        assert (out / name).read_bytes() == (again / name).read_bytes()
    looked = [json.loads(line) for line in (out / "2-select.jsonl").read_text().splitlines()]
    fates = Counter(row["reason"] or "kept" for row in looked)
    answers = [json.loads(line) for line in (out / "4-answer.jsonl").read_text().splitlines()]
    outcomes = Counter(note["outcome"] for row in answers for note in row["found"]["answer"]["calls"])
    print(f"{len(looked)} problems: {dict(fates)}; replies of the teacher: {dict(outcomes)}; {stored} stored")
    assert fates["kept"] > RECORDS // 2
    assert not {"unanswered", "refused"} & set(outcomes), "the server answered"
    assert (out / "report.html").stat().st_size > 1000
    assert KEY not in (out / "report.html").read_text() and KEY.encode() not in store.read_bytes()
