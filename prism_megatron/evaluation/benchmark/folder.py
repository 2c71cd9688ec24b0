"""An evaluation's folder, as another one reads it to compare itself with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_megatron.config.json_file import read_object
from prism_megatron.data.reading.fields import lines_of
from prism_megatron.errors import ConfigError, DataError
from prism_megatron.evaluation.benchmark.answers import ANSWERS, Answered, by_item, read_answer

BEGUN, SUMMARY, PAGE = "begun.json", "summary.json", "report.html"
"""What was asked of whom; all figures, which are written once every answer is there; the page."""


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation."""

    folder: Path
    config: Mapping[str, Any]
    """as it was begun"""
    answers: Sequence[Answered]


def read_begun(folder: Path, keys: Sequence[str]) -> dict[str, Any] | None:
    """What an evaluation was begun with, which has these ``keys``; None in a folder without one.

    Raises ConfigError for a damaged file.
    """
    path = folder / BEGUN
    if not path.is_file():
        return None
    found = read_object(path, error=ConfigError)
    if missing := set(keys) - found.keys():
        raise ConfigError(f"{path}: {min(missing)} is missing; begin in another --output")
    return found


def holds_evaluation(folder: Path) -> bool:
    """Whether one was begun in ``folder``, which may be any text."""
    try:
        return (folder / BEGUN).is_file()
    except OSError:  # such as a name that is too long
        return False


def read_evaluation(folder: Path) -> Evaluated:
    """Raises ConfigError for a folder of no finished evaluation, DataError for damaged lines."""
    begun = read_begun(folder, ("config",))
    if begun is None or not (folder / SUMMARY).is_file():
        raise ConfigError(
            f"--against {folder} holds no finished evaluation ({BEGUN} and {SUMMARY}); name the --output of one"
        )
    answers = [read_answer(line, where) for where, line in lines_of(folder / ANSWERS)]
    if not answers:
        raise DataError(f"{folder / ANSWERS} is empty; evaluate again in another --output")
    return Evaluated(folder, begun["config"], answers)


def check_same_questions(own: Sequence[Answered], base: Evaluated) -> None:
    """Raise ConfigError, in one line, unless both were asked the same questions."""
    ours, theirs = by_item(own), by_item(base.answers)
    remedy = "ask both the same: the same --data, --scenes, --seed, --part and --limit"
    if ours.keys() != theirs.keys():
        here, there = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
        one = f"{'/'.join((here or there)[0])} is in {'this one' if here else 'that one'} alone"
        raise ConfigError(
            f"--against {base.folder} has {len(theirs)} questions and this one {len(ours)}, and {one}; {remedy}"
        )
    other = [key for key in ours if ours[key][0].digest != theirs[key][0].digest]
    if other:
        raise ConfigError(
            f"--against {base.folder}: {'/'.join(other[0])} has another question, answer or image there "
            f"({len(other)} of {len(ours)} have); {remedy}"
        )
