"""The configuration of ``prism-verify-answers``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from prism_megatron.config.fields import AT_LEAST_ONE, POSITIVE, Range
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class VerifyAnswersConfig:
    """Which answers of a file are right, by the rules of RLVR's rewards (docs/rewards.md)?"""

    file: tyro.conf.Positional[Path] = Path()
    """lines of JSON with id, answer, gold and, where known, answer_type (choice, integer, float, text or bool)"""
    workers: Annotated[int, AT_LEAST_ONE] = 2
    """processes that check what needs algebra"""
    check_seconds: Annotated[float, POSITIVE] = 1.0
    """of CPU time that one check may take; one that takes more is ended, and the answer is wrong"""
    memory_gb: Annotated[float, Range(at_least=0.5)] = 1.0
    """address space of a process that checks"""


def check_verify_answers(config: VerifyAnswersConfig) -> None:
    """Raise ConfigError where there is no such file."""
    if not config.file.is_file():
        raise ConfigError(f"{config.file} is no file; name one of JSON lines (docs/rewards.md)")
