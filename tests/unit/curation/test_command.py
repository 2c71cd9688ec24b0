"""``prism-curate`` against a teacher over HTTP that fails in every way, at stated rates, and knows what it did.

Blind spot: real endpoints.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prism_megatron.commands.curate import main
from prism_megatron.config.merge import to_yaml
from prism_megatron.config.tools.curate import Endpoint, Model, Recipe, Strong
from prism_megatron.data.records import read_records
from tests.unit.curation.fakes import fates, files_of, record, rows, verdict
from tests.unit.curation.mock_teacher import (
    LASTING,
    RATES,
    MockTeacher,
    Script,
    gold,
    mock_teacher,
)
from tests.waiting import wait_for

pytest.importorskip("datasketch")

KEY, SECRET = "PRISM_TEST_TEACHER_KEY", "a-secret-that-stands-nowhere"
ATTEMPTS = 3
# What takes long by itself is rare where there are few problems.
BRIEF = {**RATES, "silent": 0.005, "late": 0.005, "endless": 0.005}
OTHERS = {
    "strong": lambda text: f"<answer>{'70003' if '[problem 3]' in text else 'none'}</answer>",
    "chooser": lambda _: "<choice>1</choice>",
    "judge": lambda _: verdict(True),
}


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)


def make_pool(folder: Path, count: int) -> Path:
    """Problems that the mock knows, each with a picture of noise that no other is near to."""
    (folder / "images").mkdir(parents=True)
    draw = np.random.default_rng(5)
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            cells = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(cells).resize((32, 32), Image.Resampling.NEAREST).save(folder / "images" / f"p{number}.png")
            one = record(f"p{number}", gold(number), question=f"What is the number of [problem {number}]?")
            file.write(json.dumps(one) + "\n")
    return folder


def write_recipe(tmp_path: Path, teacher: MockTeacher, pool: Path, *, at_once: int = 16) -> Path:
    endpoint = Endpoint(teacher.url, key=KEY, at_once=at_once, price_in=1.0, price_out=2.0)

    def model(name: str) -> Model:
        return Model(name, (endpoint,), seconds=2.0, tries=2)

    recipe = Recipe(
        data=(pool,),
        teacher=model("teacher"),
        strong=(Strong(model("strong")),),
        disambiguator=model("chooser"),
        judge=model("judge"),
        attempts=ATTEMPTS,
        best=20,
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    return path


def curate(recipe: Path, output: Path, *flags: str) -> int:
    return main(["--config", str(recipe), "--output", str(output), "--workers", "1", *flags])


def expected(script: Script, teacher: MockTeacher) -> tuple[dict[str, bool], Counter[str]]:
    """By the mock's own log: who survives, and how many different requests each problem took, by the policy alone."""
    asked: dict[int, list[tuple[str, str, bool]]] = defaultdict(list)
    for one in sorted(teacher.log, key=lambda one: one.at):
        known = {digest for digest, _, _ in asked[one.problem]} if one.problem is not None else set()
        if one.problem is not None and one.digest not in known:
            # A failure that passes says nothing of what its request comes to in the end.
            told = one.behaviour if one.behaviour in (*LASTING, *_SAID) else "right"
            asked[one.problem].append((one.digest, told, one.told))
    survives: dict[str, bool] = {}
    taken: Counter[str] = Counter()
    for problem, requests in asked.items():
        survives[f"p{problem}"] = _walk([(behaviour, told) for _, behaviour, told in requests], problem)
        taken[f"p{problem}"] = len(requests)
    return survives, taken


_SAID = ("helped", "wrong", "truncated", "broken", "hollow", "empty", "foreign", "repeats")


def _walk(requests: Sequence[tuple[str, bool]], problem: int) -> bool:
    """Whether the problem survives; fails where there is one request more or less than the policy makes."""
    left, told = ATTEMPTS, False
    for place, (behaviour, was_told) in enumerate(requests):
        assert was_told is told, (problem, requests)
        left -= 1
        is_last = place == len(requests) - 1
        right = behaviour == "right" or (behaviour == "helped" and told)
        if right:
            assert is_last, (problem, requests)
            return True
        if behaviour in ("wrong", "helped") and not told:
            left, told = ATTEMPTS, True
            assert not is_last, (problem, requests)
        elif left == 0:
            assert is_last, (problem, requests)
    assert left == 0, (problem, requests)
    return False


def check_whole(count: int, tmp_path: Path) -> None:
    pool, out, script = make_pool(tmp_path / "pool", count), tmp_path / "out", Script(BRIEF)
    with mock_teacher(script, others=OTHERS, silence_seconds=3.0) as teacher:
        recipe = write_recipe(tmp_path, teacher, pool)
        assert curate(recipe, out) == 0
        survives, taken = expected(script, teacher)
        requests = len(teacher.log)
        # The same again in another folder, from the store alone.
        assert curate(recipe, tmp_path / "again", "--store", str(out / "store.sqlite")) == 0
        assert len(teacher.log) == requests
        assert teacher.keys == {f"Bearer {SECRET}"}
    assert set(survives) == {f"p{number}" for number in range(count)} - {"p3"}, "problem 3 is too easy"
    told = fates(out, "answer")
    assert {name: fate == "kept" for name, fate in told.items()} == survives
    assert {row["problem"]["id"]: row["found"]["answer"]["attempts"] for row in rows(out, "answer")} == taken
    written = {one.id: one.answer for name in ("sft", "align") for one in read_records(out / name, purpose="train")}
    assert written == {name: gold(int(name[1:])) for name, lives in survives.items() if lives}
    own, again = files_of(out), files_of(tmp_path / "again")
    assert {name: data for name, data in own.items() if "store" not in name} == again
    assert not any(SECRET.encode() in data for data in own.values()), "the key stands in a file"


def test_exactly_those_survive_that_should(tmp_path: Path) -> None:
    """Claim: whatever it does, survivors and replies are the policy's, by the teacher's own log; what is stored
    is not asked again, and gives the same bytes; the key stands nowhere."""
    check_whole(120, tmp_path)


@pytest.mark.long
def test_of_two_thousand_exactly_those_survive_that_should(tmp_path: Path) -> None:
    check_whole(2000, tmp_path)


def came_or_ended(teacher: MockTeacher, until: int, process: subprocess.Popen[bytes]) -> bool:
    return len(teacher.log) >= until or process.poll() is not None


@pytest.mark.long
def test_kills_cost_nothing(tmp_path: Path) -> None:
    """Claim: killed at random by SIGKILL, the command goes on, no response that was stored is asked for again, and the
    files are those of one that nothing interrupted."""
    pool, out, kills = make_pool(tmp_path / "pool", 80), tmp_path / "out", 10
    script, draw = Script({"helped": 0.2, "wrong": 0.1, "truncated": 0.2, "broken": 0.1}), random.Random(20260)
    with mock_teacher(script, others=OTHERS, seconds=0.02) as teacher:
        recipe = write_recipe(tmp_path, teacher, pool, at_once=4)
        words = [sys.executable, "-m", "prism_megatron", "curate", "--config", str(recipe), "--output", str(out)]
        for _ in range(kills):
            until = len(teacher.log) + draw.randrange(5, 30)
            process = subprocess.Popen([*words, "--workers", "1"], env=os.environ, stdout=subprocess.DEVNULL)
            try:
                # A process that begins on a busy machine loads its libraries for tens of seconds.
                wait_for(partial(came_or_ended, teacher, until, process), seconds=300.0)
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()
        assert curate(recipe, out) == 0
        # What was under way at a kill was not stored, and only that is asked again.
        again = len(teacher.log) - len({one.digest for one in teacher.log})
        assert again <= 4 * kills
        assert curate(recipe, tmp_path / "whole") == 0
    own, whole = files_of(out), files_of(tmp_path / "whole")
    assert {name: data for name, data in own.items() if "store" not in name} == {
        name: data for name, data in whole.items() if "store" not in name
    }


def test_spending_ends_politely(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: with status 3 and a line that says how to go on; a higher bound goes on, and asks nothing again."""
    pool, out = make_pool(tmp_path / "pool", 40), tmp_path / "out"
    with mock_teacher(Script({}), others=OTHERS) as teacher:
        recipe = write_recipe(tmp_path, teacher, pool)
        assert curate(recipe, out, "--max-cost", "0.003") == 3
        assert "--max-cost" in capsys.readouterr().err
        assert curate(recipe, out) == 0
        assert len({one.digest for one in teacher.log}) == len(teacher.log)


def test_no_torch_is_loaded() -> None:
    """Claim: neither the command nor any part of a curation imports torch or transformers."""
    code = (
        "import sys, prism_megatron.commands.curate, prism_megatron.curation.run, prism_megatron.run.ending.stopping, "
        "prism_megatron.curation.client.caller, prism_megatron.curation.duplicates.step\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_trouble_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Claim: no recipe, a wrong one and a refused key each end with status 2 and one line that says what to do."""
    assert main([]) == 2
    assert "name the recipe: --config FILE" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text("teachr: {}", encoding="utf-8")
    assert curate(tmp_path / "recipe.yaml", tmp_path / "out") == 2
    assert "line 1: unknown key 'teachr'; did you mean teacher?" in capsys.readouterr().err
    pool = make_pool(tmp_path / "pool", 3)
    with mock_teacher(Script({"forbidden": 1.0}), others=OTHERS) as teacher:
        assert curate(write_recipe(tmp_path, teacher, pool), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert KEY in error and SECRET not in error and error.count("\n") == 1
