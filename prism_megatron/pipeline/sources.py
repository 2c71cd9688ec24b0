"""What a stage starts from: a name of its own, or what an earlier step makes, or would have begun with if skipped."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_megatron.config.merge import merge
from prism_megatron.config.pipeline.file import StageSection, plain_of, reference_of
from prism_megatron.config.yaml_file import write_yaml
from prism_megatron.pipeline.tools import Kind, Tool, Way, nested, put_at, value_at


@dataclass(frozen=True)
class Source:
    """Where a policy, a discriminator, prompts or answers come from."""

    value: str | None = None
    """as a field says it; None for a field that says nothing"""
    step: str | None = None
    """the key of the step that makes it"""
    stand_in: str | None = None
    """what is there already and of the same shape; None for nothing"""
    left_out: tuple[tuple[str, int | None], ...] = ()
    """skipped stages that would have trained it further, with their steps"""


def resolved(
    section: StageSection,
    tool: Tool,
    made: Mapping[tuple[str, Kind], Source],
    overrides: Mapping[str, Any],
    *,
    given: Mapping[Way, Source] | None = None,
) -> tuple[Any, dict[Way, Source]]:
    """The tool's configuration of a stage, as its own command would read it, and what it starts from by field.

    ``given`` says what fields start from that the section does not name. Raises PrismError as the tool's ``parse``.
    """
    values = {**plain_of(section.values), **overrides}
    sources = dict(given or {})
    for way, kind in tool.inputs.items():
        written = value_at(values, way)
        reference = reference_of(written)
        if reference is not None:
            sources[way] = made[reference.stage, kind]
        elif way not in sources:
            sources[way] = Source(written, stand_in=written)
    late: dict[Way, str | None] = {}
    for way, source in sources.items():
        if tool.inputs[way] == "prompts" and source.step is not None:
            late[way] = source.value  # a command refuses a file that is not there yet
            put_at(values, way, None)
        elif source.value is not None or value_at(values, way) is not None:
            put_at(values, way, source.value)
    with tempfile.TemporaryDirectory(prefix="prism-pipeline-") as folder:
        path = Path(folder) / f"{section.name}.yaml"
        path.write_text(write_yaml(values), encoding="utf-8")
        config = tool.parse(["--config", str(path)])
    for way, value in late.items():
        config = merge(config, nested(way, value))
    return config, sources


def start_of(tool: Tool, config: Any, sources: Mapping[Way, Source]) -> Source:
    """The policy that a stage starts from; the mini's where its configuration names none."""
    way = tool.way_of("policy")
    source = Source() if way is None else sources[way]
    if source.value is None and tool.mini_policy is not None:
        mini = str(tool.mini_policy(config))
        return Source(mini, stand_in=mini, left_out=source.left_out)
    return source
