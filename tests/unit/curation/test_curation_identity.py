"""What a curation in a folder is of, and what is refused before anything is asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.tools.curate import Recipe, Strong
from prism_megatron.errors import ConfigError, DataError
from prism_megatron.run.alone import alone_in
from tests.unit.curation.fakes import (
    JUDGE,
    TEACHER,
    FakeAsker,
    fates,
    files_of,
    model,
    play,
    record,
    respond,
    write_pool,
)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"best": 5}, "recipe.best was 4 and is 5"),
        ({"attempts": 2}, "recipe.attempts was 3 and is 2"),
        ({"teacher": replace(TEACHER, name="other")}, 'recipe.teacher.name was "teacher" and is "other"'),
        ({"judge": JUDGE}, "recipe.judge was null and is"),
        ({"strong": ()}, "recipe.strong was .* and is \\[\\]"),
        ({"strong": (Strong(model("big"), samples=3),)}, r"recipe\.strong\[0\]\.samples was 2 and is 3"),
    ],
)
def test_another_recipe_is_another_curation(change: dict[str, Any], told: str, recipe: Recipe, tmp_path: Path) -> None:
    """Claim: it is refused before anything is asked, names what differs, and says how stored answers are used again."""
    out = tmp_path / "out"
    play(out, recipe, FakeAsker(respond), until="select")
    before = files_of(out)
    asker = FakeAsker(respond)
    with pytest.raises(ConfigError, match=f"was begun otherwise: {told}.*--store {out}/store.sqlite"):
        play(out, replace(recipe, **change), asker)
    assert not asker.calls and files_of(out) == before


def test_other_data_are_another_curation(recipe: Recipe, tmp_path: Path) -> None:
    out, pool = tmp_path / "out", recipe.data[0]
    play(out, recipe, FakeAsker(respond), until="select")
    with pytest.raises(ConfigError, match="limit was null and is 3"):
        play(out, recipe, FakeAsker(respond), limit=3)
    text = (pool / "data.jsonl").read_text(encoding="utf-8")
    (pool / "data.jsonl").write_text(text.replace("has p5?", "has p5 now?"), encoding="utf-8")
    with pytest.raises(ConfigError, match="begun otherwise: data was"):
        play(out, recipe, FakeAsker(respond))


def test_other_endpoints_are_the_same_curation(recipe: Recipe, tmp_path: Path) -> None:
    """Claim: where a model is served, and how patiently it is asked, may change from one command to the next."""
    out, asker = tmp_path / "out", FakeAsker(respond)
    play(out, recipe, asker, until="select")
    moved = replace(
        TEACHER, endpoints=(replace(TEACHER.endpoints[0], url="http://elsewhere/v1"),), seconds=5.0, tries=1
    )
    play(out, replace(recipe, teacher=moved), FakeAsker(respond, store=asker.store))
    assert (out / "align").is_dir()


def test_other_prompts_are_another_curation(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(tmp_path / "out", recipe, FakeAsker(respond), until="select")
    monkeypatch.setattr("prism_megatron.curation.identity.versions", lambda: {"teacher": "another"})
    with pytest.raises(ConfigError, match=r'prompts\.teacher was "[0-9a-f]{12}" and is "another"'):
        play(tmp_path / "out", recipe, FakeAsker(respond))


def test_one_command_at_a_time(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        alone_in(out, command="prism-curate"),
        pytest.raises(ConfigError, match="another prism-curate is at work"),
    ):
        play(out, recipe, FakeAsker(respond))


def test_what_is_for_evaluation_only_is_no_pool(tmp_path: Path) -> None:
    """Claim: by the folder's name or a line's source, before anything is asked, and nothing is left behind."""
    line = record("a", source="mathvision/1")
    asker = FakeAsker(respond)
    for folder, records in (("mathvision_testmini", [record("a")]), ("pool", [record("b"), line])):
        pool = write_pool(tmp_path / folder, records)
        with pytest.raises(DataError, match="for evaluation only"):
            play(tmp_path / "out", Recipe(data=(pool,), teacher=TEACHER), asker)
    assert not asker.calls and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [("{}", "field id: missing"), (json.dumps(record("a") | {"image": "images/gone.png"}), "cannot be found"),
     (json.dumps(record("p0")), "field id: 'p0' was used before")],
)  # fmt: skip
def test_a_malformed_line_ends_it_before_anything_is_asked(line: str, told: str, tmp_path: Path) -> None:
    pool = write_pool(tmp_path / "pool", [record("p0")])
    with (pool / "data.jsonl").open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    asker = FakeAsker(respond)
    with pytest.raises(DataError, match=f"data.jsonl:3: .*{told}"):
        play(tmp_path / "out", Recipe(data=(pool,), teacher=TEACHER), asker)
    assert not asker.calls


def test_ids_of_several_folders_are_told_apart(tmp_path: Path) -> None:
    pools = tuple(write_pool(tmp_path / name, [record("p1", "1"), record("p5", "5")]) for name in ("one", "two"))
    play(tmp_path / "out", Recipe(data=pools, teacher=TEACHER, best=0), FakeAsker(respond), limit=1)
    assert list(fates(tmp_path / "out", "deduplicate")) == ["p1@one", "p1@two"]


def test_steps_without_their_record_are_nobodys(recipe: Recipe, tmp_path: Path) -> None:
    play(tmp_path / "out", recipe, FakeAsker(respond), until="deduplicate")
    (tmp_path / "out" / "curation.json").unlink()
    with pytest.raises(ConfigError, match="nobody knows what they are of"):
        play(tmp_path / "out", recipe, FakeAsker(respond))
