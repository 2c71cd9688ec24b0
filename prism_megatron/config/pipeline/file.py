"""The file of a pipeline: named stages in their order, each with its tool and the sections of that tool's own YAML."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from prism_megatron.config.yaml_file import Section, read_yaml
from prism_megatron.errors import ConfigError

BASE = "base"
"""What the policy is called that the first stage starts from; no stage may have the name."""
EVALUATE = "evaluate"

_MAX_SHOWN, _MAX_OFFERED = 60, 8
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_REFERENCE = re.compile(r"@(?P<stage>[^/]*)(?:/(?P<file>.*))?", re.DOTALL)
_OWN = ("tool", "launcher")
"""What a stage says to the pipeline; everything else is its tool's."""


@dataclass(frozen=True)
class StageSection:
    """One stage as it is written. ``values`` are the sections of its tool's YAML."""

    name: str
    tool: str
    values: Section
    place: str
    """file and line"""
    launcher: tuple[str, ...] | None = None
    """the words that start it in place of the pipeline's; None where the stage says nothing"""


@dataclass(frozen=True)
class PipelineFile:
    """A file that was read; ``evaluate`` is what every policy is asked, None for nothing.

    Example: ``prism_megatron/assets/pipelines/mini.yaml``.
    """

    path: Path
    stages: Sequence[StageSection]
    evaluate: StageSection | None
    launcher: tuple[str, ...]


class Reference(NamedTuple):
    """``@NAME`` or ``@NAME/FILE``: what an earlier stage has made."""

    stage: str
    file: str | None


def read_pipeline(path: Path, *, tools: Collection[str]) -> PipelineFile:
    """Read the file, whose stages may have one of these ``tools``; what is in their sections is not looked at.

    Raises ConfigError, with the line, for anything that is no pipeline.
    """
    values = read_yaml(path)
    assert isinstance(values, Section)
    _check_keys(values, ("stages", EVALUATE, "launcher"))
    stages = values.get("stages")
    if not isinstance(stages, Section) or not stages:
        raise ConfigError(
            f"{values.place('stages')}: stages must hold named stages, such as `sft: {{tool: sft, steps: 100}}`"
        )
    sections = [_stage(stages, name, tools) for name in stages]
    evaluate = values.get(EVALUATE)
    asked = None
    if evaluate is not None:
        inner = _section(values, EVALUATE)
        place = values.place(EVALUATE)
        asked = StageSection(EVALUATE, EVALUATE, inner.without(*_OWN[1:]), place, _launcher(inner))
    return PipelineFile(path, sections, asked, _launcher(values) or ())


def reference_of(value: object) -> Reference | None:
    """What a value names; None for one that begins with no ``@``."""
    found = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    return None if found is None else Reference(found["stage"], found["file"])


def near(name: str, known: Collection[str]) -> str:
    """The names to offer in place of an unknown one."""
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5) or list(known)[:_MAX_OFFERED])


def short(value: object) -> str:
    """As a complaint shows it."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def _stage(stages: Section, name: str, tools: Collection[str]) -> StageSection:
    place, inner = stages.place(name), _section(stages, name)
    if not _NAME.fullmatch(name) or name == BASE:
        raise ConfigError(
            f"{place}: {short(name)} cannot be a stage's name, which names its folder: use small letters, digits, - "
            f"and _, and not {BASE!r}, which is what the first stage starts from"
        )
    tool = inner.get("tool")
    if tool is None:
        raise ConfigError(f"{place}: stage {name} has no tool; write one of {', '.join(tools)}")
    if tool not in tools:
        raise ConfigError(
            f"{inner.place('tool')}: there is no tool {short(tool)} for stages; did you mean {near(str(tool), tools)}?"
        )
    return StageSection(name, str(tool), inner.without(*_OWN), place, _launcher(inner))


def _section(values: Section, name: str) -> Section:
    inner = values[name]
    if not isinstance(inner, Section):
        raise ConfigError(f"{values.place(name)}: {name} must hold keys with values")
    return inner


def _launcher(values: Section) -> tuple[str, ...] | None:
    words: Any = values.get("launcher")
    if words is None:
        return None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ConfigError(
            f'{values.place("launcher")}: launcher must be a list of words, such as [torchrun, --nproc-per-node, "8"]; '
            "put numbers in quotes"
        )
    return tuple(words)


def _check_keys(values: Section, known: Sequence[str]) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{values.place(key)}: unknown key {short(key)}; did you mean {near(key, known)}?")


def plain_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested sections as plain mappings, which may be changed."""
    return {key: plain_of(value) if isinstance(value, Mapping) else value for key, value in values.items()}
