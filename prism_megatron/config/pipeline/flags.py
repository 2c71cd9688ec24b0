"""The flags of ``prism-pipeline``; its stages stand in a file (``config/pipeline/file.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.stages.algorithms import AlgorithmName
from prism_megatron.errors import ConfigError

BUILT_IN = MINI_FOLDER.parent / "pipelines" / "mini.yaml"
"""The mini world's five stages."""


@dataclass(frozen=True)
class PipelineConfig:
    """Play the stages of a file one after the other, each as a run of its own tool, and report on all of them
    (docs/pipeline.md)."""

    config: Path = BUILT_IN
    """YAML with the stages and the evaluation; without it the mini world's five"""
    output: Path | None = None
    """folder of all runs; without it a new one under runs/"""
    resume: Literal["no", "auto"] = "no"
    """auto: one command line is the first and every later try; finished stages are left alone, unless their settings or
    what they read are others now"""
    skip: tuple[str, ...] = ()
    """stages that are left out: what they would have started from stands for what they would have made, and the steps
    of a skipped policy are added to the stage that trains it next"""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """the first stage to play; what earlier ones have made is used as it is, whatever their settings are now"""
    until: str | None = None
    """the last stage to play"""
    seed: int | None = None
    """of every stage, in place of its own; the questions of the evaluation stay the same"""
    algo: AlgorithmName | None = None
    """of every rlvr stage, in place of its own"""


def check_flags(config: PipelineConfig) -> None:
    """Raise ConfigError for flags that cannot go together."""
    if config.resume == "auto" and config.output is None:
        raise ConfigError("--resume auto goes on with what is in --output; name the pipeline's folder with it")
