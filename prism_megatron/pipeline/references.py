"""Which stages name which: what ``@NAME`` may stand for, and who is skipped with whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prism_megatron.config.merge import merge
from prism_megatron.config.pipeline.file import (
    EVALUATE,
    PipelineFile,
    Reference,
    StageSection,
    near,
    reference_of,
    short,
)
from prism_megatron.config.yaml_file import Section
from prism_megatron.errors import ConfigError
from prism_megatron.pipeline.tools import Kind, Tool, Way, value_at


def references(section: StageSection, tool: Tool) -> dict[Way, Reference]:
    """The fields of a stage that name an earlier one."""
    found = {way: reference_of(value_at(section.values, way)) for way in tool.inputs}
    return {way: reference for way, reference in found.items() if reference is not None}


def check_references(file: PipelineFile, tools: Mapping[str, Tool]) -> None:
    """Raise ConfigError, with the line, for keys and values that a stage's tool does not have, and for names of what no
    earlier stage makes."""
    earlier: dict[str, Tool] = {}
    for section in file.stages:
        tool = tools[section.tool]
        _check_section(section, tool, f"stage {section.name}")
        for way, reference in references(section, tool).items():
            place = _place(section.values, way)
            kind = tool.inputs[way]
            if reference.stage not in earlier:
                later = reference.stage in [other.name for other in file.stages]
                why = "is no stage before this one" if later else "is no stage"
                able = [name for name, other in earlier.items() if kind in other.makes]
                hint = f"did you mean @{near(reference.stage, able)}?" if able else f"none before makes a {kind}"
                raise ConfigError(f"{place}: {short(f'@{reference.stage}')} {why}; {hint}")
            _check_kind(reference, kind, earlier[reference.stage], place)
        earlier[section.name] = tool
    if file.evaluate is not None:
        tool = tools[EVALUATE]
        _check_section(file.evaluate, tool, EVALUATE)
        for way in tool.inputs:
            if value_at(file.evaluate.values, way) is not None:
                raise ConfigError(
                    f"{_place(file.evaluate.values, way)}: what is evaluated, and against what, is the pipeline's to "
                    f"say; leave {'.'.join(way)} out"
                )
        if not any(tools[section.tool].trains_a_policy for section in file.stages):
            raise ConfigError(f"{file.evaluate.place}: no stage trains a policy; leave {EVALUATE} out")


def skipped_with(names: Sequence[str], stages: Sequence[StageSection], tools: Mapping[str, Tool]) -> frozenset[str]:
    """The stages of these names, and others that make no policy and that only skipped ones use."""
    users: dict[str, set[str]] = {section.name: set() for section in stages}
    for section in stages:
        for reference in references(section, tools[section.tool]).values():
            users[reference.stage].add(section.name)
    skipped = set(names)
    for section in reversed(stages):
        used_by = users[section.name]
        if used_by and used_by <= skipped and not tools[section.tool].trains_a_policy:
            skipped.add(section.name)
    return frozenset(skipped)


def _check_section(section: StageSection, tool: Tool, name: str) -> None:
    # What is named stands for text and files alike: the types are those of the tool's own YAML.
    merge(tool.fresh(), section.values)
    for way in tool.commands_own():
        if value_at(section.values, way) is not None:
            raise ConfigError(
                f"{_place(section.values, way)}: {name}: where a step writes and how it goes on is the pipeline's to "
                f"say; leave {'.'.join(way)} out"
            )


def _check_kind(reference: Reference, kind: Kind, tool: Tool, place: str) -> None:
    name = short(f"@{reference.stage}" if reference.file is None else f"@{reference.stage}/{reference.file}")
    if kind not in tool.makes:
        raise ConfigError(
            f"{place}: a {kind} is wanted, and stage {reference.stage} ({tool.name}) makes {' and '.join(tool.makes)}"
        )
    wanted = tool.makes[kind]
    if reference.file != wanted:
        form = f"@{reference.stage}" if wanted is None else f"@{reference.stage}/{wanted}"
        raise ConfigError(f"{place}: {name} is no {kind}; write {form}")


def _place(values: Section, way: Way) -> str:
    """File and line of a field."""
    inner: object = values
    for name in way[:-1]:
        inner = inner.get(name) if isinstance(inner, Section) else None
    return inner.place(way[-1]) if isinstance(inner, Section) else values.place(way[0])
