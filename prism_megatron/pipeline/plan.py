"""From a pipeline's file and flags to steps that can be played: every setting is known and checked before the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prism_megatron.config.merge import merge
from prism_megatron.config.pipeline.file import BASE, PipelineFile, StageSection, near
from prism_megatron.config.pipeline.flags import PipelineConfig
from prism_megatron.errors import ConfigError, PrismError
from prism_megatron.pipeline.references import check_references, skipped_with
from prism_megatron.pipeline.sources import Source, resolved, start_of
from prism_megatron.pipeline.tools import Kind, Tool, Way, nested

STAGES, EVALUATIONS = "stages", "evaluations"
"""The folders in a pipeline's that hold its runs, each in one of its step's name."""


@dataclass(frozen=True)
class Step:
    """One run of a tool: a stage, or the evaluation of a policy."""

    key: str
    """its folder in the pipeline's, such as ``stages/align`` or ``evaluations/base``"""
    stage: str
    """the stage that it belongs to"""
    tool: Tool
    config: Any
    """complete, with the folders of earlier steps where it starts from those"""
    checked: Any
    """the same with something of the same shape where what it names is not there yet"""
    uses: Mapping[Way, str]
    """fields that name what an earlier step makes, with its key"""
    launcher: Sequence[str]
    added_steps: int = 0
    """those of skipped stages, which are among its own"""

    @property
    def name(self) -> str:
        """For people."""
        folder, _, name = self.key.partition("/")
        return f"stage {name}" if folder == STAGES else f"evaluation of {name}"


@dataclass(frozen=True)
class Plan:
    """What is to be played, in order, and what is left out."""

    title: str
    output: Path
    steps: Sequence[Step]
    skipped: Sequence[str]
    earlier: frozenset[str]
    """stages before ``--from``"""


def plan_of(file: PipelineFile, flags: PipelineConfig, tools: Mapping[str, Tool], output: Path) -> Plan:
    """The steps of a file. Nothing is written.

    Raises ConfigError, with line and stage, for what cannot be played; models and layouts are looked at by
    :func:`check_all`.
    """
    names = [section.name for section in file.stages]
    for flag, named in (("--skip", flags.skip), ("--from", (flags.from_,)), ("--until", (flags.until,))):
        for name in named:
            if name is not None and name not in names:
                raise ConfigError(f"{flag} {name}: {file.path} has no such stage; did you mean {near(name, names)}?")
    check_references(file, tools)
    skipped = skipped_with(flags.skip, file.stages, tools)
    steps = _Planner(file, flags, tools, output, skipped).plan()
    # From the first to the last that was asked for.
    first = 0 if flags.from_ is None else names.index(flags.from_)
    last = len(names) if flags.until is None else names.index(flags.until) + 1
    if first >= last:
        raise ConfigError(f"--from {flags.from_} comes after --until {flags.until}; swap them")
    played = [step for step in steps if step.stage in names[:last]]
    return Plan(file.path.stem, output, played, [name for name in names if name in skipped], frozenset(names[:first]))


def check_all(plan: Plan) -> None:
    """Ask every tool whether it can work, as far as that is known before earlier steps have been played.

    Raises ConfigError, with the name of the step, where one cannot.
    """
    for step in plan.steps:
        try:
            step.tool.check(step.checked)
        except PrismError as error:
            raise ConfigError(f"{step.name}: {error}") from error


@dataclass
class _Planner:
    """Makes the steps of a file, in order: behind every policy its evaluation, and before the first its start's."""

    file: PipelineFile
    flags: PipelineConfig
    tools: Mapping[str, Tool]
    output: Path
    skipped: frozenset[str]
    made: dict[tuple[str, Kind], Source] = field(default_factory=dict)
    """what a later stage may start from, by the stage that it names"""
    steps: list[Step] = field(default_factory=list)

    def plan(self) -> list[Step]:
        for section in self.file.stages:
            tool = self.tools[section.tool]
            config, sources = self._resolved(section, tool)
            start = start_of(tool, config, sources)
            if tool.trains_a_policy and not any(step.key.startswith(EVALUATIONS) for step in self.steps):
                self._evaluate(BASE, section.name, start)
            if section.name in self.skipped:
                self._leave_out(section, tool, config, start, sources)
                continue
            added = _added(section, start, config) if tool.trains_a_policy else 0
            config = replace(config, steps=config.steps + added) if added else config
            key = f"{STAGES}/{section.name}"
            self._add(key, section, config, sources, stage=section.name, added_steps=added)
            for kind, file_name in tool.makes.items():
                place = self.output / key if file_name is None else self.output / key / file_name
                stand_in = start.stand_in if kind == "policy" else _stand_in(tool, kind, sources)
                self.made[section.name, kind] = Source(str(place), key, stand_in)
            if tool.trains_a_policy:
                self._evaluate(section.name, section.name, self.made[section.name, "policy"])
        return self.steps

    def _resolved(self, section: StageSection, tool: Tool) -> tuple[Any, dict[Way, Source]]:
        overrides: dict[str, Any] = {} if self.flags.seed is None else {"seed": self.flags.seed}
        if self.flags.algo is not None and hasattr(tool.fresh(), "algo"):
            overrides["algo"] = self.flags.algo
        try:
            return resolved(section, tool, self.made, overrides)
        except PrismError as error:
            raise ConfigError(f"{section.place}: stage {section.name}: {error}") from error

    def _leave_out(
        self, section: StageSection, tool: Tool, config: Any, start: Source, sources: Mapping[Way, Source]
    ) -> None:
        """What a skipped stage would have started from stands for what it would have made."""
        for kind in tool.makes:
            way = tool.way_of(kind)
            own = Source() if way is None else sources[way]
            if kind == "policy" and tool.policy_steps is not None:
                own = replace(start, left_out=(*start.left_out, (section.name, tool.policy_steps(config))))
            self.made[section.name, kind] = own

    def _evaluate(self, name: str, stage: str, policy: Source) -> None:
        section = self.file.evaluate
        if section is None:
            return
        tool = self.tools[section.tool]
        of_policy, against = tool.way_of("policy"), tool.way_of("answers")
        assert of_policy is not None and against is not None
        sources = {of_policy: policy}
        if name != BASE:
            base = f"{EVALUATIONS}/{BASE}"
            sources[against] = Source(str(self.output / base), base)
        try:
            config, _ = resolved(section, tool, {}, {}, given=sources)
        except PrismError as error:
            raise ConfigError(f"{section.place}: {section.name}: {error}") from error
        self._add(f"{EVALUATIONS}/{name}", section, config, sources, stage=stage)

    def _add(
        self,
        key: str,
        section: StageSection,
        config: Any,
        sources: Mapping[Way, Source],
        *,
        stage: str,
        added_steps: int = 0,
    ) -> None:
        uses = {way: source.step for way, source in sources.items() if source.step is not None}
        checked = config
        for way in uses:
            checked = merge(checked, nested(way, sources[way].stand_in))
        launcher = self.file.launcher if section.launcher is None else section.launcher
        self.steps.append(Step(key, stage, self.tools[section.tool], config, checked, uses, launcher, added_steps))


def _stand_in(tool: Tool, kind: Kind, sources: Mapping[Way, Source]) -> str | None:
    """What is there already and of the shape of what a stage makes of this kind."""
    way = tool.way_of(kind)
    return None if way is None else sources[way].stand_in


def _added(section: StageSection, start: Source, config: Any) -> int:
    """Steps of skipped stages that the next one takes over."""
    if not start.left_out:
        return 0
    for name, count in (*start.left_out, (section.name, config.steps)):
        if count is None:
            raise ConfigError(
                f"{section.place}: the steps of skipped stages are added to those of stage {section.name}, and how "
                f"many stage {name} has is not said; give it steps"
            )
    return sum(count or 0 for _, count in start.left_out)
