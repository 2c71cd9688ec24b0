"""The configuration of ``prism-curate``: what stands on the command line, and what stands in its file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from prism_megatron.config.fields import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, SHARE, Range, check_fields
from prism_megatron.config.merge import merge
from prism_megatron.config.tools.requests import check_address, request_fields
from prism_megatron.config.yaml_file import read_yaml
from prism_megatron.errors import ConfigError

Step = Literal["deduplicate", "select", "disambiguate", "answer", "split", "write"]
STEPS: tuple[Step, ...] = ("deduplicate", "select", "disambiguate", "answer", "split", "write")


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint that serves a model."""

    url: str = ""
    """its address up to and with ``/v1``"""
    weight: Annotated[float, POSITIVE] = 1.0
    """share of the model's calls, beside its other endpoints'"""
    key: str | None = None
    """name of the environment variable that holds its key; None sends none"""
    served_model: str | None = None
    """what it calls the model, where that is not the model's own name"""
    at_once: Annotated[int, AT_LEAST_ONE] = 16
    """calls under way at a time"""
    requests_per_minute: Annotated[int | None, AT_LEAST_ONE] = None
    """calls that may begin in any minute, those that are tried again among them; None for no limit"""
    tokens_per_minute: Annotated[int | None, AT_LEAST_ONE] = None
    """tokens of prompts and answers that calls of any minute may have; None for no limit"""
    price_in: Annotated[float, NOT_NEGATIVE] = 0.0
    """of a million tokens of prompts"""
    price_out: Annotated[float, NOT_NEGATIVE] = 0.0
    """of a million tokens of answers"""


@dataclass(frozen=True)
class Model:
    """A model that is asked, how, and where."""

    name: str = ""
    """in requests; what is stored is stored under it, whichever endpoint answered"""
    endpoints: tuple[Endpoint, ...] = ()
    temperature: Annotated[float | None, NOT_NEGATIVE] = 1.0
    """None sends none"""
    top_p: Annotated[float | None, Range(above=0, at_most=1)] = None
    """None sends none"""
    max_tokens: Annotated[int, AT_LEAST_ONE] = 8192
    """of an answer; one that is longer counts as truncated"""
    request_fields: str | None = None
    """a JSON object of further fields of every request, over those that are sent anyway; null leaves one out"""
    seconds: Annotated[float, POSITIVE] = 600.0
    """after which a call is given up, from its first byte to its last"""
    tries: Annotated[int, AT_LEAST_ONE] = 6
    """of one call that gets no answer, or is told to come again"""

    @property
    def fields(self) -> dict[str, Any]:
        """Those of ``request_fields``. Raises ConfigError for anything but a JSON object of what may stand there."""
        return request_fields(self.request_fields, named="request_fields")


@dataclass(frozen=True)
class Strong:
    """A model whose pass rate tells how hard a problem is."""

    model: Model = field(default_factory=Model)
    samples: Annotated[int, AT_LEAST_ONE] = 1
    """answers to each problem"""


@dataclass(frozen=True)
class Duplicates:
    """What counts as the same problem (docs/curation.md)."""

    image_distance: Annotated[int, Range(at_least=0, at_most=64)] = 8
    """bits of 64 by which perceptual hashes of one picture differ at most"""
    text_overlap: Annotated[float, SHARE] = 0.8
    """Jaccard index of word shingles from which on questions are the same by their text"""


@dataclass(frozen=True)
class Quality:
    """Weights of what makes a demonstration good; the score is their mean, from 0 to 1."""

    unaided: Annotated[float, NOT_NEGATIVE] = 2.0
    """the teacher found the answer without being told it"""
    at_once: Annotated[float, NOT_NEGATIVE] = 1.0
    """one attempt was enough; half for two, a third for three"""
    hard: Annotated[float, NOT_NEGATIVE] = 1.0
    """1 less the pass rate of the strong models; left out where none is asked"""
    caption: Annotated[float, NOT_NEGATIVE] = 1.0
    """words of the caption, of ``caption_words``"""
    reasoning: Annotated[float, NOT_NEGATIVE] = 1.0
    """words of the reasoning, of ``reasoning_words``"""
    caption_words: Annotated[int, AT_LEAST_ONE] = 100
    reasoning_words: Annotated[int, AT_LEAST_ONE] = 200


@dataclass(frozen=True)
class Recipe:
    """A curation, as its file describes it."""

    data: tuple[Path, ...] = ()
    """folders of problems, in the form ``ours`` (docs/data.md); captions and solutions that they have are not used"""
    evaluation: tuple[Path, ...] = ()
    """folders of records that models are evaluated on: what is near one of them is refused"""
    teacher: Model = field(default_factory=Model)
    """writes caption, reasoning and answer"""
    strong: tuple[Strong, ...] = ()
    """models of which no problem is kept that they answer right too often; without one all are kept"""
    keep_to: Annotated[float, SHARE] = 0.0
    """pass rate of the strong models up to which a problem is kept; 0 keeps those that none ever answers right"""
    disambiguator: Model | None = None
    """says which one question an image is for; without one the first question of an image is kept"""
    judge: Model | None = None
    """says whether an answer is right that rules cannot compare; without one such problems are left out"""
    judge_all: bool = False
    """ask the judge about answers too that rules found right"""
    attempts: Annotated[int, AT_LEAST_ONE] = 3
    """answers of the teacher to a problem, at most, until one is whole and in the asked form; as many again once it is
    told the right answer"""
    tell_answer: bool = True
    """ask again with the right answer where the teacher's is wrong"""
    duplicates: Duplicates = field(default_factory=Duplicates)
    best: Annotated[int, NOT_NEGATIVE] = 6000
    """of the highest quality that alignment and RL get; the rest is for fine-tuning"""
    quality: Quality = field(default_factory=Quality)
    seed: int = 42
    """keys what is drawn: samples where a server takes seeds, and the order of equals"""

    @property
    def models(self) -> dict[str, Model]:
        """Every model that is asked, by its role as ``Call.role`` has it."""
        others = {"disambiguator": self.disambiguator, "judge": self.judge}
        return {
            **{f"strong {number}": one.model for number, one in enumerate(self.strong)},
            "teacher": self.teacher,
            **{role: model for role, model in others.items() if model is not None},
        }


@dataclass(frozen=True)
class CurateConfig:
    """Make demonstrations of problems: select, ask a teacher, check, and split (docs/curation.md)."""

    config: Path | None = None
    """YAML file with the recipe"""
    output: Path | None = None
    """folder of the result; one that was begun is gone on with. Without it a new one under runs/"""
    store: Path | None = None
    """file of all answers of endpoints, which several runs on this host may share; by default in the output"""
    until: Step | None = None
    """the last step to play; all by default"""
    limit: Annotated[int | None, AT_LEAST_ONE] = None
    """the first so many problems of every folder alone"""
    max_cost: Annotated[float | None, POSITIVE] = None
    """what all answers in the store may have cost; calls under way are waited for, and no other is begun"""
    workers: Annotated[int, AT_LEAST_ONE] = 2
    """processes that check what needs algebra, and that hash pictures"""
    check_seconds: Annotated[float, POSITIVE] = 1.0
    """of CPU time that one check may take; one that takes more is ended, and the answer is wrong"""
    shown: Annotated[int, NOT_NEGATIVE] = 3
    """examples of each verdict on the page"""
    progress_seconds: tyro.conf.Suppress[float] = 10.0
    """between lines about rate, cost and time left"""


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises ConfigError, with the line, for what is none."""
    return merge(Recipe(), read_yaml(path))


def check_curate(config: CurateConfig, recipe: Recipe, environ: Mapping[str, str]) -> None:
    """Raise ConfigError for what cannot work, as far as that is known before anything is read or asked."""
    where = str(config.config)
    check_fields(config)
    check_fields(recipe, named=lambda one: f"{where}: {'.'.join(one.path)}")
    _check_folders(recipe, where)
    for role, model in recipe.models.items():
        _check_model(model, f"{where}: {role}", environ)
    if recipe.judge_all and recipe.judge is None:
        raise ConfigError(f"{where}: judge_all asks a judge, and there is none; add judge, or leave judge_all out")
    weights = ("unaided", "at_once", "hard", "caption", "reasoning")
    if not sum(getattr(recipe.quality, name) for name in weights):
        raise ConfigError(f"{where}: quality: one of the weights {', '.join(weights)} must be above 0")
    if config.store is not None and not config.store.parent.is_dir():
        raise ConfigError(f"--store {config.store}: its folder is not there; make it, or name another file")


def without_endpoints(recipe: Recipe) -> Recipe:
    """What of a recipe decides what comes out: all but where models are served, and how patiently they are asked."""

    def bare(model: Model) -> Model:
        return dataclasses.replace(model, endpoints=(), seconds=Model.seconds, tries=Model.tries)

    return dataclasses.replace(
        recipe,
        teacher=bare(recipe.teacher),
        strong=tuple(dataclasses.replace(one, model=bare(one.model)) for one in recipe.strong),
        disambiguator=None if recipe.disambiguator is None else bare(recipe.disambiguator),
        judge=None if recipe.judge is None else bare(recipe.judge),
    )


def _check_folders(recipe: Recipe, where: str) -> None:
    if not recipe.data:
        raise ConfigError(f"{where}: data names no folder; name one or more with data.jsonl and images")
    names: dict[str, Path] = {}
    for kind, folders in (("data", recipe.data), ("evaluation", recipe.evaluation)):
        for folder in folders:
            if not folder.is_dir():
                raise ConfigError(f"{where}: {kind}: {folder} is not a folder; name one with data.jsonl and images")
    pool = [folder.resolve() for folder in recipe.data]
    for folder in pool:
        if folder.name in names:
            raise ConfigError(f"{where}: data: two folders are called {folder.name!r}; rename or link one of them")
        names[folder.name] = folder
    for folder in recipe.evaluation:
        if folder.resolve() in pool:
            raise ConfigError(f"{where}: {folder} is data and evaluation too; leave it out of one of them")


_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


def _check_model(model: Model, where: str, environ: Mapping[str, str]) -> None:
    if not model.name:
        raise ConfigError(f"{where} has no name; give the one that goes into requests")
    if not model.endpoints:
        raise ConfigError(f"{where} has no endpoints; name one, such as `endpoints: [{{url: http://HOST/v1}}]`")
    try:
        _ = model.fields
        for endpoint in model.endpoints:
            check_address(endpoint.url, key="a key stands in the environment variable that `key` names")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    for endpoint in model.endpoints:
        if endpoint.key is None:
            continue
        # What stands there by mistake may be the key itself: it is not shown.
        if not _VARIABLE.fullmatch(endpoint.key):
            raise ConfigError(f"{where}: key must be the name of an environment variable, such as TEACHER_KEY: capital "
                              "letters, digits and _; the key itself does not stand in the recipe")  # fmt: skip
        if not environ.get(endpoint.key, "").strip():
            raise ConfigError(f"{where}: the environment variable {endpoint.key} is not set; set it to the key of "
                              f"{endpoint.url}, or leave key out")  # fmt: skip
