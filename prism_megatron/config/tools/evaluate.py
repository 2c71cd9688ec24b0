"""The configuration of ``prism-evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from prism_megatron.config.architecture.model import MiniWorld
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.fields import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, OnResume, Range, check_fields
from prism_megatron.config.stages.data import STRUCTURED_SYSTEM_PROMPT, DataConfig
from prism_megatron.config.stages.rewards import RewardsConfig
from prism_megatron.config.tools.requests import check_address, request_fields
from prism_megatron.errors import ConfigError

API_KEY = "PRISM_EVALUATE_API_KEY"
"""Variable with an endpoint's key; without it none is sent."""
SCENES = "scenes"
"""What the mini world's scenes are called where others have the name of their folder."""
Which = Literal["all", "validation"]
_URL = ("http://", "https://")


@dataclass(frozen=True)
class EndpointConfig:
    """How an OpenAI-compatible endpoint is asked."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FREE

    served_model: Annotated[str | None, OnResume.FIXED] = None
    """the model's name in requests to an endpoint"""
    served_files: Annotated[str | None, OnResume.FIXED] = None
    """the Qwen3-VL that the endpoint serves, in any form that MODEL takes: images are sent in the size that training
    sees, and the endpoint must read every prompt as as many tokens as training makes of it"""
    request_fields: Annotated[str | None, OnResume.FIXED] = None
    """a JSON object of further fields of every request, over those that are sent anyway; null leaves one out"""
    requests_at_once: Annotated[int, AT_LEAST_ONE] = 8
    """requests under way at a time"""
    request_seconds: Annotated[float, POSITIVE] = 600.0
    """that an endpoint may be silent for in one request"""
    request_attempts: Annotated[int, AT_LEAST_ONE] = 5
    """tries of one request that gets no answer, or is told to come again; a Retry-After of up to --request-seconds is
    heeded"""
    on_unanswered: Literal["stop", "count"] = "stop"
    """what is done about a request that no try got answered, and about an endpoint that refuses all that it is asked at
    the start: stop, so that the same command goes on, or count such as failures, which are wrong"""

    @property
    def fields(self) -> dict[str, Any]:
        """Those of --request-fields. Raises ConfigError for anything but a JSON object without what is not for it."""
        return request_fields(self.request_fields, named="--request-fields")


@dataclass(frozen=True)
class EvaluateConfig:
    """How many questions does a model answer right (docs/evaluation.md)?"""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    model: tyro.conf.Positional[str] = ""
    """run folder, checkpoint, model folder, hub id (org/name@revision), or the URL of an OpenAI-compatible endpoint
    (http://HOST/v1)"""
    data: tuple[Path, ...] = ()
    """folders of records, each a set; those for evaluation only too"""
    scenes: Annotated[int, NOT_NEGATIVE] = 0
    """held-out scenes of the mini world, as one more set"""
    mini: MiniWorld = "habits"
    """which mini world --scenes are of; bare --mini is the first"""
    part: Which = "all"
    """of every folder: all records, or those that training on it holds out"""
    limit: Annotated[int | None, AT_LEAST_ONE] = None
    """the first so many records of every folder alone"""
    samples: Annotated[int, NOT_NEGATIVE] = 0
    """answers to each question that are drawn, beside the greedy one"""
    temperature: Annotated[float, POSITIVE] = 1.0
    """of the samples"""
    top_p: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """nucleus mass of the samples; 1 samples from the whole distribution"""
    seed: int = 42
    """keys the samples and the scenes"""
    system_prompt: str | None = STRUCTURED_SYSTEM_PROMPT
    """system message before every question, that of training; None for none"""
    strict_format: bool = True
    """exactly one of each tag, in order, no empty body, nothing outside; off: PRISM's released, lax rule"""
    min_pixels: Annotated[int | None, AT_LEAST_ONE] = None
    """smaller images are enlarged to this area; by default the model's own limit"""
    max_pixels: Annotated[int | None, AT_LEAST_ONE] = None
    """larger images are shrunk to this area; by default the model's own limit"""
    max_prompt_tokens: Annotated[int, AT_LEAST_ONE] = 2048
    """a question that takes more, image tokens included, is a failure, which is counted and wrong"""
    max_response_tokens: Annotated[int, AT_LEAST_ONE] = 6144
    """answers are cut off here"""
    rewards: tyro.conf.OmitArgPrefixes[RewardsConfig] = field(default_factory=RewardsConfig)
    endpoint: tyro.conf.OmitArgPrefixes[EndpointConfig] = field(default_factory=EndpointConfig)
    against: Annotated[str | None, OnResume.FREE] = None
    """what to compare with: the --output of another evaluation, of the same questions, or a model in any form of MODEL
    but a URL, which is asked the same first (in OUTPUT/against)"""
    output: Annotated[Path | None, OnResume.COMMAND] = None
    """folder of the result; one that was begun is gone on with. Without it a new one under runs/"""
    shown: Annotated[int, NOT_NEGATIVE, OnResume.FREE] = 12
    """questions that the page shows with image and answers"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """compute type of the policy; auto takes the folder's own"""
    questions_at_once: Annotated[int, AT_LEAST_ONE] = 32
    """questions that are asked together; after each such batch answers are on the disk"""
    ranks: Annotated[int, AT_LEAST_ONE, OnResume.FREE] = 1
    """processes to start on this host, which share the questions; torchrun starts its own"""
    distributed_timeout_minutes: Annotated[int, AT_LEAST_ONE, OnResume.FREE] = 30
    """how long ranks wait for one another before all give up"""

    @property
    def url(self) -> str | None:
        """The endpoint that is asked; None for a model that is loaded."""
        return self.model.rstrip("/") if self.model.startswith(_URL) else None

    def of_base(self, output: Path) -> EvaluateConfig:
        """That of the model that --against names, which is asked the same and writes to ``output``."""
        return replace(self, model=self.against or "", endpoint=EndpointConfig(), against=None, output=output)

    @property
    def parallel(self) -> ParallelConfig:
        """Nothing of the policy is split: every rank answers for itself."""
        return ParallelConfig(distributed_timeout_minutes=self.distributed_timeout_minutes)

    @property
    def as_trained(self) -> DataConfig:
        """How questions become tokens, in the words of training."""
        return DataConfig(
            system_prompt=self.system_prompt,
            strict_format=self.strict_format,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_response_tokens,
        )


def check_evaluate(config: EvaluateConfig) -> None:
    """Raise ConfigError for what cannot work, whatever the model."""
    check_fields(config)
    if not config.model:
        raise ConfigError(
            "name what to evaluate: a run folder, a checkpoint, a model folder, a hub id or http://HOST/v1"
        )
    if not config.data and not config.scenes:
        raise ConfigError("name what to ask: --data FOLDER..., or --scenes N for the mini world's")
    if config.against is not None and config.against.startswith(_URL):
        raise ConfigError(f"--against {config.against}: evaluate an endpoint by itself, and name the --output of that")
    _check_sets(config)
    if config.url is not None:
        _check_endpoint(config, config.url)
    elif any((config.endpoint.served_model, config.endpoint.served_files, config.endpoint.request_fields)):
        raise ConfigError(
            f"--served-model, --served-files and --request-fields are of an endpoint, and {config.model} is none; name "
            "one as http://HOST/v1"
        )


def _check_sets(config: EvaluateConfig) -> None:
    names = [SCENES] if config.scenes else []
    for folder in config.data:
        if not folder.is_dir():
            raise ConfigError(f"--data {folder} is not a folder; name one with data.jsonl and images")
        name = folder.resolve().name
        if name in names:
            raise ConfigError(f"--data {folder}: another set is called {name!r} too; rename or link one of the folders")
        names.append(name)


def _check_endpoint(config: EvaluateConfig, url: str) -> None:
    endpoint = config.endpoint
    check_address(url, key=f"a key stands in {API_KEY}")
    if endpoint.served_model is None:
        raise ConfigError("--served-model is needed: the name that the endpoint knows the model by")
    if config.ranks > 1:
        raise ConfigError(f"--ranks {config.ranks}: an endpoint is asked by one process; see --requests-at-once")
    if endpoint.served_files is None and (config.min_pixels or config.max_pixels):
        raise ConfigError("--min-pixels and --max-pixels need --served-files: how images are cut depends on the model")
    _ = endpoint.fields
