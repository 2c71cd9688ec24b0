"""A curation as a whole: what it writes, that nothing but inputs decides it, and that a crash costs nothing."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.tools.curate import STEPS, CurateConfig, Recipe
from prism_megatron.curation.calls import Call, Response
from prism_megatron.curation.files import path_of
from prism_megatron.curation.page import PAGE, SUMMARY
from prism_megatron.curation.run import curate
from prism_megatron.curation.steps import Parts, threads_of
from prism_megatron.curation.write import PROVENANCE
from prism_megatron.data.records import read_records
from prism_megatron.errors import ConfigError, DataError, PrismError, RunStopped
from tests.unit.curation.fakes import (
    TEACHER,
    FakeAsker,
    Respond,
    fates,
    files_of,
    good,
    keep_all,
    name_of,
    play,
    record,
    respond,
    rows,
    write_pool,
)


def late(seed: int) -> Respond:
    """The same after pauses that differ with the seed, so that answers come in another order."""
    draw, lock = random.Random(seed), threading.Lock()

    def answer(call: Call) -> Response | str:
        with lock:
            pause = draw.random() * 0.004
        threading.Event().wait(pause)
        return respond(call)

    return answer


def test_what_is_written(recipe: Recipe, tmp_path: Path) -> None:
    """Claim: both folders are records of ours, with the pool's question, image and answer, the teacher's caption and
    reasoning, and a line of provenance for each."""
    out = tmp_path / "out"
    asker = FakeAsker(respond)
    play(out, recipe, asker)
    kept = {f"p{number}" for number in (0, 1, 3, 5, 6, 7, 8, 9, 10)} | {"chosen"}
    assert {name for name, fate in fates(out, "answer").items() if fate == "kept"} == kept
    pool = {one.id: one for one in read_records(recipe.data[0], purpose="train")}
    written = {name: read_records(out / name, purpose="train") for name in ("sft", "align")}
    assert len(written["align"]) == 4
    assert {one.id for own in written.values() for one in own} == kept
    for name, records in written.items():
        lines = [json.loads(line) for line in (out / name / PROVENANCE).read_text("utf-8").splitlines()]
        assert [line["id"] for line in lines] == [one.id for one in records]
        for one, line in zip(records, lines, strict=True):
            own = pool[one.id]
            assert (one.question, one.choices, one.answer, one.answer_type, one.source, one.difficulty) == (
                own.question, own.choices, own.answer, own.answer_type, own.source, own.difficulty,
            )  # fmt: skip
            assert one.image.read_bytes() == own.image.read_bytes()
            assert one.caption == f"The picture of {one.id} has ünïcode dots." and one.solution == "I count the dots."
            assert line["key"] in asker.store and line["folder"] == str(recipe.data[0])
            assert f"{line['folder']}/data.jsonl:{line['line']}" == own.where
            assert line["picture"] == hashlib.sha256(own.image.read_bytes()).hexdigest()
            assert line["attempts"] == {"p1": 3, "p3": 2}.get(one.id, 1) and line["unaided"] is (one.id != "p3")
            assert {note["role"] for own_notes in line["calls"].values() for note in own_notes} == {
                "strong 0",
                "teacher",
            }


def test_nothing_but_inputs_decides_the_bytes(recipe: Recipe, tmp_path: Path) -> None:
    """Claim: answers that come in any order, from a store or anew, by few threads or many, make the same files."""
    first = FakeAsker(respond, threads=1)
    play(tmp_path / "a", recipe, first)
    wanted = files_of(tmp_path / "a")
    for seed in range(3):
        play(tmp_path / f"b{seed}", recipe, FakeAsker(late(seed), threads=8))
        assert files_of(tmp_path / f"b{seed}") == wanted
    again = FakeAsker(respond, store=first.store)
    many = replace(TEACHER, endpoints=(replace(TEACHER.endpoints[0], at_once=64),) * 2)
    play(tmp_path / "c", replace(recipe, teacher=many), again)
    assert files_of(tmp_path / "c") == wanted and not again.asked


class KilledError(BaseException):
    """What no code of ours may catch: the process is gone."""


def test_a_crash_costs_nothing(recipe: Recipe, tmp_path: Path) -> None:
    """Claim: killed at any call and begun again, it asks for nothing that is stored, and ends in the same bytes."""
    play(tmp_path / "whole", recipe, FakeAsker(respond))
    wanted = files_of(tmp_path / "whole")
    out, store = tmp_path / "out", dict[str, Response]()
    asked = limit = 0

    def dying(call: Call) -> Response | str:
        if len(store) >= limit:
            raise KilledError
        return respond(call)

    for _ in range(20):
        limit = len(store) + 5
        asker = FakeAsker(dying, store=store)
        try:
            play(out, recipe, asker)
        except KilledError:
            assert not list(out.glob(".*.part")), "what was under way is not taken for a step"
        else:
            break
        finally:
            asker.close()
            asked += asker.asked.total()
    assert files_of(out) == wanted
    assert asked == len(store) == len({call.key for call in asker.calls} | set(store))


@pytest.mark.parametrize("step", STEPS)
def test_a_step_may_be_the_last(step: str, recipe: Recipe, tmp_path: Path) -> None:
    """Claim: --until ends after it, with a report; going on does the rest alone and comes to the same."""
    play(tmp_path / "whole", recipe, FakeAsker(respond))
    out, store = tmp_path / "out", dict[str, Response]()
    play(out, recipe, FakeAsker(respond, store=store), until=step)
    assert [one for one in STEPS[:-1] if path_of(out, one).is_file()] == list(STEPS[: min(STEPS.index(step) + 1, 5)])
    assert (out / PAGE).is_file() and (out / "sft").exists() == (step == "write")
    said = play(out, recipe, FakeAsker(respond, store=store))
    assert [line for line in said if line.endswith("done before")] == [
        f"{one}: done before" for one in STEPS[: STEPS.index(step) + 1]
    ]
    assert files_of(out) == files_of(tmp_path / "whole")


def test_finished_steps_ask_nobody(recipe: Recipe, tmp_path: Path) -> None:
    """Claim: where all steps that ask are done, no endpoint is opened."""
    play(tmp_path / "out", recipe, FakeAsker(respond), until="answer")

    def closed() -> Any:
        raise AssertionError("endpoints were opened")

    parts = Parts(keep_all, closed, lambda _: None)
    config = CurateConfig(output=tmp_path / "out", workers=1)
    curate(config, recipe, lambda _: parts, say=lambda _: None)
    assert (tmp_path / "out" / "sft").is_dir()


def test_sets_that_a_kill_left_are_written_anew(recipe: Recipe, tmp_path: Path) -> None:
    """Claim: one of two folders without the mark that both are whole is not trusted."""
    out = tmp_path / "out"
    play(out, recipe, FakeAsker(respond))
    wanted = files_of(out)
    (out / "6-write.json").unlink()
    (out / "sft" / "data.jsonl").write_text("", encoding="utf-8")
    (out / ".align.writing").mkdir()
    play(out, recipe, FakeAsker(respond))
    assert files_of(out) == wanted and not (out / ".align.writing").exists()


def test_a_wish_to_stop_is_heard(recipe: Recipe, tmp_path: Path) -> None:
    """Claim: no call begins after it, what was answered is stored, and the same command goes on."""
    asker = FakeAsker(respond)
    wish = threading.Event()

    def check() -> None:
        if wish.is_set():
            raise RunStopped("stopped by SIGTERM")

    def stopping(call: Call) -> Response | str:
        if call.role == "teacher":
            wish.set()
        return respond(call)

    asker.respond = stopping
    with pytest.raises(RunStopped, match=f"stopped by SIGTERM; the same command with --output {tmp_path}/out goes on"):
        play(tmp_path / "out", recipe, asker, check_going_on=check)
    assert len(asker.of("teacher")) <= threads_of((TEACHER,)) and len(asker.store) == len({c.key for c in asker.calls})
    asker.respond = respond
    play(tmp_path / "out", recipe, asker)
    assert max(asker.asked.values()) == 1


def test_trouble_of_an_endpoint_ends_it(recipe: Recipe, tmp_path: Path) -> None:
    """Claim: an error that a curation cannot go on with reaches the user as it is, and no step is taken for done."""

    def spent(call: Call) -> str:
        raise ConfigError("--max-cost 1 is spent")

    with pytest.raises(ConfigError, match="--max-cost 1 is spent"):
        play(tmp_path / "out", recipe, FakeAsker(spent))
    assert [one.name for one in (tmp_path / "out").glob("?-*")] == ["1-deduplicate.jsonl"]


def test_a_damaged_step_says_what_to_do(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    play(out, recipe, FakeAsker(respond), until="select")
    path = path_of(out, "select")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"2-select\.jsonl is damaged .*remove it"):
        play(out, recipe, FakeAsker(respond))
    path.unlink()
    play(out, recipe, FakeAsker(respond))


def test_a_disk_that_is_full_says_so(recipe: Recipe, tmp_path: Path) -> None:
    """Claim: a step whose file cannot be written ends the command with the file's name."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".1-deduplicate.jsonl.part").mkdir()
    with pytest.raises(PrismError, match=r"1-deduplicate\.jsonl cannot be written"):
        play(out, recipe, FakeAsker(respond))


def test_progress_tells_rate_cost_and_time_left(recipe: Recipe, tmp_path: Path) -> None:
    said = play(tmp_path / "out", recipe, FakeAsker(respond), progress_seconds=0.0)
    (line,) = [one for one in said if one.startswith("answer: 5 of 12")]
    assert "/s, " in line and " left; answers: " in line and "cost 0.0" in line
    (last,) = [one for one in said if one.startswith("answer: 10 of 12 kept in ")]
    assert "1 a wrong answer" in last and "1 no whole reply in the asked form" in last


def test_the_report_adds_up(recipe: Recipe, tmp_path: Path) -> None:
    """Claim: every problem is kept or fallen once, every answer and its cost is counted, and every verdict is shown."""
    out, asker = tmp_path / "out", FakeAsker(respond)
    said = play(out, recipe, asker, shown=1)
    summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    kept = 14
    for step in summary["steps"]:
        assert step["problems"] == kept and step["kept"] + sum(step["fallen"].values()) == kept
        kept = step["kept"]
    assert kept == 10 and {name: one["records"] for name, one in summary["sets"].items()} == {"sft": 6, "align": 4}
    calls = {role: one["calls"] for role, one in summary["usage"].items()}
    assert calls == {"strong 0": len(asker.of("strong 0")), "teacher": len(asker.of("teacher"))}
    assert summary["cost"] == pytest.approx(0.001 * len(asker.store)) and summary["kept_unaided"] == 9
    assert summary["teacher_replies"] == {"kept": {"1": 8, "2": 1, "3": 1}, "fallen": {"3": 1, "4": 1}}
    assert sum(summary["outcomes"]["teacher"].values()) == calls["teacher"]
    page = (out / PAGE).read_text(encoding="utf-8")
    for verdict in ("select: a strong model passes", "disambiguate: another question of the picture was chosen",
                    "answer: a wrong answer", "answer: no whole reply in the asked form", "split: kept"):  # fmt: skip
        assert f"<h2>{verdict}</h2>" in page
    assert any(line.startswith("teacher ") and "answers of teacher" in line for line in said)


def test_hostile_text_is_text_on_the_page(tmp_path: Path) -> None:
    """Claim: whatever a model or a question holds, nothing of it becomes markup."""
    hostile = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x00"
    pool = write_pool(tmp_path / "pool", [record("a", question=f"{hostile} How many dots has a?"), record("p5", "5")])
    recipe = Recipe(data=(pool,), teacher=TEACHER, best=0)

    def attack(call: Call) -> str:
        return hostile if name_of(call) == "a" else good("5", caption=hostile, think=f"{hostile} 5")

    play(tmp_path / "out", recipe, FakeAsker(attack))
    page = (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    assert "<script" not in page and "<img src=x" not in page and "\u202e" not in page and "\x00" not in page
    assert "&lt;script&gt;" in page
    (one,) = read_records(tmp_path / "out" / "sft", purpose="train")
    assert one.caption == hostile, "in the record it is as it was"


def test_memory_of_window_is_bounded(tmp_path: Path) -> None:
    """Claim: of a step's problems only a bounded number is under way or waits for its turn."""
    from prism_megatron.curation.in_order import in_order

    taken, lock, most = 0, threading.Lock(), 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(500):
            with lock:
                taken += 1
            yield number

    done = 0
    for result in in_order(lambda one: one * 2, items(), threads=3, ahead=9):
        assert result == 2 * done
        done += 1
        most = max(most, taken - done)
    assert done == 500 and most <= 12


def test_rows_are_few(recipe: Recipe, tmp_path: Path) -> None:
    """Claim: a step passes on what it kept alone; what fell stands in the file of the step where it fell."""
    out = tmp_path / "out"
    play(out, recipe, FakeAsker(respond))
    for step, following in pairwise(STEPS[:-1]):
        kept = {row["problem"]["id"] for row in rows(out, step) if row["kept"]}
        assert kept == {row["problem"]["id"] for row in rows(out, following)}
