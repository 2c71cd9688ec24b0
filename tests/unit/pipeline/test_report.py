"""The report over all stages: its table, and that nothing in it becomes markup."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prism_megatron.evaluation.benchmark.folder import read_evaluation
from tests.unit.pipeline.fakes import Home


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = Home(tmp_path_factory.mktemp("pipeline"))
    home.play()
    return home


def row(home: Home, name: str) -> list[str]:
    (line,) = [line for line in home.table if line.startswith(f"{name} ")]
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_the_table_has_the_figures_of_every_stage(played: Home) -> None:
    """Claim: accuracy is that of the stage's own evaluation, steps are its own."""
    for name, steps in (("teach", 3), ("play", 5), ("reward", 7)):
        answers = read_evaluation(played.output / "evaluations" / name).answers
        cells = row(played, name)
        assert cells[2] == str(steps)
        assert cells[3].startswith(f"{sum(one.counts for one in answers) / len(answers):.3f} [")
        assert cells[5].startswith("1.000 [") and cells[6].startswith("1.500 [")
    assert row(played, "choose")[2] == "1 of 1 prompts"
    assert row(played, "judge")[3] == "–"


def test_changes_are_those_from_the_base(played: Home) -> None:
    right = {
        name: [one.counts for one in read_evaluation(played.output / "evaluations" / name).answers]
        for name in ("base", "reward")
    }
    change = (sum(right["reward"]) - sum(right["base"])) / len(right["base"])
    assert row(played, "reward")[4].startswith(f"{change:+.3f} [")
    assert row(played, "base")[4] == "–"


def test_what_a_model_wrote_is_no_markup(played: Home) -> None:
    page = (played.output / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert page.count("<article>") == 4


def test_the_same_question_stands_once_with_all_answers(played: Home) -> None:
    page = (played.output / "report.html").read_text()
    first = page.split("<article>")[1]
    for name in ("before:", "after teach:", "after play:", "after reward:"):
        assert first.count(f"<h3>{name}") == 1


def test_stages_link_to_their_own_reports(played: Home) -> None:
    page = (played.output / "report.html").read_text()
    for name in ("teach", "judge", "play", "reward"):
        assert f"href='stages/{name}/report.html'" in page
        assert (played.output / "stages" / name / "report.html").is_file()
    assert "href='stages/choose/" not in page  # it writes none


def test_only_minutes_say_when(played: Home) -> None:
    document = json.loads((played.output / "report.json").read_text())
    assert set(document["minutes"]) == {one["name"] for one in document["steps"]}
    assert str(played.folder) not in json.dumps(document) and "seconds" not in json.dumps(document)


def test_added_steps_and_what_is_skipped_are_said(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.play(skip=("play",))
    assert row(home, "reward")[2] == "12 (5 of skipped stages)"
    assert home.report()["skipped"] == ["judge", "play"]
    assert "Skipped: judge, play." in (home.output / "report.html").read_text()


def test_what_is_left_is_said(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.play(until="judge")
    home.text += "\n"
    assert home.report()["left"] == []
    assert "4 of 4 steps are done" in (home.output / "report.html").read_text()
