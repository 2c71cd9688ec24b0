"""The configuration of ``prism-make-pairs``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from prism_megatron.config.fields import AT_LEAST_ONE, check_fields
from prism_megatron.errors import ConfigError

_ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class MakePairsConfig:
    """Make preference pairs of references and of stored answers of a student (docs/alignment.md)."""

    data: Path | None = None
    """folder of records with captions, solutions and answers, in the form ``ours`` (docs/data.md)"""
    answers: Path | None = None
    """JSON lines with id and response, several to an id if there are; or the folder of an evaluation"""
    output: Path | None = None
    """folder to write, which must not be there yet: pairs.jsonl, which --pairs reads, and images"""
    rejected: Annotated[int, AT_LEAST_ONE] = 8
    """answers of one problem that become pairs, at most; the first in the file's order"""


@dataclass(frozen=True)
class Places:
    """What a configuration names: all of it is there, but for ``output``."""

    data: Path
    answers: Path
    output: Path


def check_make_pairs(config: MakePairsConfig) -> Places:
    """What is read and written. Raises ConfigError for what is not given, or is no file."""
    check_fields(config)
    if config.data is None or config.answers is None or config.output is None:
        missing = next(name for name in ("data", "answers", "output") if getattr(config, name) is None)
        raise ConfigError(f"--{missing} is needed: name the records, the student's answers, and a folder to write")
    answers = config.answers / _ANSWERS if config.answers.is_dir() else config.answers
    if not answers.is_file():
        raise ConfigError(f"--answers {answers} is no file; name JSON lines with id and response, or an evaluation")
    return Places(config.data, answers, config.output)
