"""Plays a stage from its configuration to its artefacts: build, restore, play, save, finish, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

import yaml

from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.merge import save, to_yaml
from prism_megatron.config.run import RunConfig
from prism_megatron.engine.runtime import World
from prism_megatron.errors import PrismError
from prism_megatron.observability.metrics import MetricsWriter
from prism_megatron.run.checkpoints import checkpoint_to_load
from prism_megatron.run.files import CONFIG, METRICS
from prism_megatron.run.folder import claim_run_folder
from prism_megatron.run.readings import readings
from prism_megatron.run.record import RunRecord
from prism_megatron.run.reporting import OpenSinks, Reporter
from prism_megatron.run.session import Session
from prism_megatron.run.sinks import Sink, check_sinks, open_sinks
from prism_megatron.run.stage import Stage


class StageConfig(Protocol):
    """What the driver reads of a stage's configuration."""

    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def run(self) -> RunConfig: ...
    @property
    def seed(self) -> int: ...


ConfigT = TypeVar("ConfigT", bound=StageConfig)


def drive(world: World, config: ConfigT, build: Callable[[ConfigT, Session], Stage], *, kind: str) -> None:
    """One whole run; ``kind`` names a new run's folder. All ranks together.

    Raises PrismError for bad input before anything is trained, and where the finished stage names a problem.
    """
    check_sinks(config.run.log_to)
    output = claim_run_folder(config.checkpoint, world, kind=kind)
    restored = checkpoint_to_load(config.checkpoint.load, output)
    config = _with_output(config, output)
    session = Session(world, output, load=config.checkpoint.load, restored=restored)
    if world.is_main:
        save(config, output / CONFIG)
    session.open()
    session.show_text(to_yaml(config))
    reporting = partial(Reporter, session, every=config.run.report_every, open_sinks=_sinks_of(config, session))
    with closing(session), closing(build(config, session)) as stage, reporting(stage) as reporter:
        first_step = 0
        if restored is not None:
            first_step = session.checkpoints.restore(stage, restored, seed=config.seed)
            session.say(f"restored {' and '.join(stage.engines())} from {restored}")
        stage.prepare(first_step)
        if stage.may_go_back and session.checkpoints.good_step is None:
            _save(session, stage, first_step, seed=config.seed, good=True)
        play(session, stage, range(first_step, stage.total_steps), config, reporter)
        artefacts = stage.finish(output)
        reporter.finish(artefacts)
    if artefacts.problem is not None:
        raise PrismError(artefacts.problem)


def play(session: Session, stage: Stage, steps: range, config: StageConfig, reporter: Reporter) -> None:
    """All ``steps``, or fewer where the stage stops, with a row, a line of the table and checkpoints."""
    if not steps:
        return
    if (reason := stage.finished()) is not None:
        session.say(reason)
        return
    session.say(f"{stage.name}: steps {steps.start + 1} to {steps.stop}")
    session.begin_table(stage.view.columns, total_steps=steps.stop)
    writer = MetricsWriter(session.output / METRICS, first_step=steps.start) if session.world.is_main else None
    reporter.begin(steps.start)
    for step in steps:
        session.activity.step = step + 1
        outcome = stage.play(step)
        seconds = {f"seconds/{phase}": s for phase, s in session.timers.take().items()}
        row = {**outcome.row, **seconds, **readings(session.world)}
        if writer is not None:
            writer.write(row)
            reporter.step(row)
        session.show(row)
        for line in outcome.lines:
            session.say(line)
        done, stops = step + 1, outcome.verdict == "stop"
        if done % config.checkpoint.save_every == 0 or done == steps.stop or stops:
            _save(session, stage, done, seed=config.seed, good=outcome.good)
        if stops:
            break
    session.activity.step = None
    if writer is not None:
        writer.close()


def _save(session: Session, stage: Stage, step: int, *, seed: int, good: bool) -> None:
    started = time.perf_counter()
    with session.phase("checkpoint"):
        folder = session.checkpoints.save(stage, step, seed=seed, good=good)
    session.say(f"saved {folder} in {time.perf_counter() - started:.1f} s")


def _sinks_of(config: StageConfig, session: Session) -> OpenSinks:
    run, say = config.run, session.say

    def opened(record: RunRecord, first_step: int) -> Sequence[Sink]:
        plain = yaml.safe_load(to_yaml(config))
        return open_sinks(run.log_to, folder=session.output, record=record, first_step=first_step,
                          run_name=run.run_name, config=plain, say=say)  # fmt: skip

    return opened


def _with_output(config: Any, output: Any) -> Any:
    """The configuration with the folder that the run really has."""
    return replace(config, checkpoint=replace(config.checkpoint, output=output))
