"""The configuration of ``prism-visual-reliance``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.fields import AT_LEAST_ONE, NOT_NEGATIVE, check_fields
from prism_megatron.config.stages.data import STRUCTURED_SYSTEM_PROMPT, DataConfig
from prism_megatron.config.tools.drift import file_of
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class VisualRelianceConfig:
    """How much do a policy's words depend on the image (docs/drift.md)?"""

    model: str | None = None
    """the policy: run folder, checkpoint, model folder or hub id (org/name@revision)"""
    data: Path | None = None
    """folder of records with images; those for evaluation only too"""
    scenes: Annotated[int, NOT_NEGATIVE] = 0
    """held-out scenes of the mini world, in place of --data"""
    part: Literal["all", "validation"] = "validation"
    """of the folder: all records, or those that training on it holds out"""
    limit: Annotated[int | None, AT_LEAST_ONE] = None
    """the first so many records alone"""
    responses: Path | None = None
    """whose words are read, by the ids of questions: JSON lines as prism-drift takes them, such as an evaluation's
    answers; without it the references"""
    mode: Literal["greedy", "sampled"] = "greedy"
    """which answers of an evaluation count"""
    system_prompt: str | None = STRUCTURED_SYSTEM_PROMPT
    """system message before every question, that of training; None for none, which is the default with --scenes"""
    min_pixels: Annotated[int | None, AT_LEAST_ONE] = None
    """smaller images are enlarged to this area; by default the model's own limit"""
    max_pixels: Annotated[int | None, AT_LEAST_ONE] = None
    """larger images are shrunk to this area; by default the model's own limit"""
    max_prompt_tokens: Annotated[int, AT_LEAST_ONE] = 2048
    """longer questions, image tokens included, are left out"""
    max_response_tokens: Annotated[int, AT_LEAST_ONE] = 6144
    """longer responses are left out"""
    tokens_per_microbatch: Annotated[int, AT_LEAST_ONE] = 16384
    """tokens that one forward pass holds at most, unless a single response has more"""
    parallel: tyro.conf.OmitArgPrefixes[ParallelConfig] = field(default_factory=ParallelConfig)
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """compute type of the policy; auto takes the folder's own"""
    output: Path | None = None
    """JSON file of all figures"""
    seed: Annotated[int, NOT_NEGATIVE] = 42
    """keys scenes and bootstrap"""

    @property
    def as_trained(self) -> DataConfig:
        """How questions become tokens, in the words of training."""
        return DataConfig(system_prompt=self.system_prompt, min_pixels=self.min_pixels, max_pixels=self.max_pixels)


def check_visual_reliance(config: VisualRelianceConfig) -> None:
    """Raise ConfigError for what cannot work, whatever the model."""
    check_fields(config)
    if config.model is None:
        raise ConfigError("--model is needed: name the policy whose words are looked at")
    if (config.data is None) == (not config.scenes):
        raise ConfigError("name either --data FOLDER or --scenes N, whose images are shown and hidden")
    if config.data is not None and not config.data.is_dir():
        raise ConfigError(f"--data {config.data} is not a folder; name one with data.jsonl and images")
    if config.responses is not None:
        file_of(config.responses)
    if config.output is not None and config.output.is_dir():
        raise ConfigError(f"--output {config.output} is a folder; name a file, such as reliance.json")
