"""What a recipe may say, and every complaint that needs nobody to be asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.merge import merge, to_yaml
from prism_megatron.config.tools.curate import (
    CurateConfig,
    Endpoint,
    Model,
    Recipe,
    Strong,
    check_curate,
    read_recipe,
    without_endpoints,
)
from prism_megatron.errors import ConfigError

ENVIRON = {"TEACHER_KEY": "a-secret"}
MODEL = {"name": "m", "endpoints": [{"url": "http://host/v1"}]}


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "pool").mkdir()
    (tmp_path / "held").mkdir()
    return {"data": [str(tmp_path / "pool")], "evaluation": [str(tmp_path / "held")], "teacher": MODEL}


def check(plain: dict[str, Any], environ: dict[str, str] | None = None, **flags: Any) -> None:
    config = CurateConfig(config=Path("recipe.yaml"), **flags)
    check_curate(config, merge(Recipe(), plain), ENVIRON if environ is None else environ)


def test_a_recipe_that_can_work(plain: dict[str, Any]) -> None:
    keyed = {"name": "m", "endpoints": [{"url": "https://host:1/v1", "key": "TEACHER_KEY", "weight": 2}],
             "request_fields": '{"seed": null}'}  # fmt: skip
    check(plain | {"teacher": keyed, "judge": MODEL, "judge_all": True, "strong": [{"model": MODEL, "samples": 4}]})


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"data": []}, "recipe.yaml: data names no folder"),
        ({"data": ["/nowhere"]}, "data: /nowhere is not a folder"),
        ({"evaluation": ["/nowhere"]}, "evaluation: /nowhere is not a folder"),
        ({"teacher": {"endpoints": MODEL["endpoints"]}}, "recipe.yaml: teacher has no name"),
        ({"teacher": {"name": "m"}}, "teacher has no endpoints"),
        ({"judge": {"name": "m"}}, "judge has no endpoints"),
        ({"strong": [{"model": MODEL}, {"model": {"name": "m"}}]}, "strong 1 has no endpoints"),
        ({"disambiguator": {}}, "disambiguator has no name"),
        ({"judge_all": True}, "judge_all asks a judge, and there is none"),
        ({"keep_to": 1.5}, r"recipe.yaml: keep_to 1\.5 must be at least 0 and at most 1"),
        ({"attempts": 0}, "attempts 0 must be at least 1"),
        ({"strong": [{"model": MODEL, "samples": 0}]}, r"strong\.0\.samples 0 must be at least 1"),
        ({"teacher": {"name": "m", "endpoints": [{"url": "http://h/v1", "weight": 0}]}},
         r"teacher\.endpoints\.0\.weight 0 must be above 0"),
        ({"quality": dict.fromkeys(("unaided", "at_once", "hard", "caption", "reasoning"), 0)}, "must be above 0"),
        ({"teacher": MODEL | {"request_fields": "{"}}, "teacher: request_fields '{' is no JSON"),
        ({"teacher": MODEL | {"request_fields": "[1]"}}, "must be an object"),
        ({"teacher": MODEL | {"request_fields": '{"stream": true}'}}, "stream is not for it to say"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_is_asked(
    values: dict[str, Any], complaint: str, plain: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check(plain | values)


@pytest.mark.parametrize("url", ["host/v1", "ftp://host/v1", "http://", "http://me:word@host/v1", "http://h/v1?key=x",
                                 "http://h:0/v1", "http://h:x/v1", ""])  # fmt: skip
def test_an_address_is_a_host_and_a_path_alone(url: str, plain: dict[str, Any]) -> None:
    """Claim: what may be a key or a password in it is not said again."""
    with pytest.raises(ConfigError, match=r"recipe\.yaml: teacher: ") as told:
        check(plain | {"teacher": {"name": "m", "endpoints": [{"url": url}]}})
    assert "word" not in str(told.value) and "key=x" not in str(told.value)


def test_a_key_is_a_variable_that_is_set(plain: dict[str, Any]) -> None:
    """Claim: a key that stands in the recipe by mistake is refused and not shown."""
    teacher = {"name": "m", "endpoints": [{"url": "http://host/v1", "key": "TEACHER_KEY"}]}
    for environ in ({}, {"TEACHER_KEY": " "}):
        with pytest.raises(ConfigError, match="variable TEACHER_KEY is not set"):
            check(plain | {"teacher": teacher}, environ)
    teacher = {"name": "m", "endpoints": [{"url": "http://host/v1", "key": "sk-proj-123"}]}
    with pytest.raises(ConfigError, match="key must be the name of an environment variable") as told:
        check(plain | {"teacher": teacher})
    assert "sk-proj" not in str(told.value)


def test_folders_of_a_pool_have_names_of_their_own(plain: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "other" / "pool").mkdir(parents=True)
    with pytest.raises(ConfigError, match="two folders are called 'pool'"):
        check(plain | {"data": [*plain["data"], str(tmp_path / "other" / "pool")]})
    with pytest.raises(ConfigError, match="is data and evaluation too"):
        check(plain | {"evaluation": plain["data"]})


def test_a_store_needs_its_folder(plain: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--store .*its folder is not there"):
        check(plain, store=tmp_path / "none" / "store.sqlite")
    with pytest.raises(ConfigError, match="--workers 0 must be at least 1"):
        check(plain, workers=0)


def test_a_file_becomes_a_recipe_and_back(tmp_path: Path) -> None:
    recipe = Recipe(
        data=(Path("a"), Path("b")),
        teacher=Model("t", (Endpoint("http://h/v1", key="K"), Endpoint("http://i/v1", weight=2.0))),
        strong=(Strong(Model("s", (Endpoint("http://h/v1"),)), samples=4),),
        judge=Model("j", (Endpoint("http://h/v1"),), temperature=None),
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert read_recipe(path) == recipe
    assert list(recipe.models) == ["strong 0", "teacher", "judge"]


def test_the_examples_are_recipes() -> None:
    """Claim: they can be read, and name no key but by a variable."""
    folder = Path(__file__).parents[3] / "examples" / "curation"
    paths = sorted(folder.glob("*.yaml"))
    assert len(paths) == 2
    for path in paths:
        recipe = read_recipe(path)
        for role, model in recipe.models.items():
            assert model.name and model.endpoints, f"{path}: {role}"


def test_where_models_are_served_decides_nothing() -> None:
    """Claim: endpoints, patience and prices may change between two commands; what is asked may not."""
    recipe = Recipe(teacher=Model("t", (Endpoint("http://h/v1"),)), strong=(Strong(Model("s"), 2),), judge=Model("j"))
    moved = replace(
        recipe,
        teacher=Model("t", (Endpoint("http://i/v1", at_once=99),), seconds=1.0, tries=1),
        strong=(Strong(Model("s", (Endpoint("http://h/v1"),)), 2),),
        judge=Model("j", tries=2),
    )
    assert without_endpoints(recipe) == without_endpoints(moved)
    for other in (replace(recipe, judge=Model("j", temperature=0.0)), replace(recipe, teacher=Model("u"))):
        assert without_endpoints(recipe) != without_endpoints(other)
