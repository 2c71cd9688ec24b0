"""Plays a stage from its configuration to its artefacts: begin, build, restore, play, save, finish, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prism_megatron.config.merge import to_plain, to_yaml
from prism_megatron.conversion.checkpoint_folder import latest
from prism_megatron.disk import disk_error, writing
from prism_megatron.engine.launch import advise
from prism_megatron.engine.runtime import World
from prism_megatron.errors import LostRankError, NothingTrainsError, PrismError, RunStopped
from prism_megatron.evaluation.report import write_report
from prism_megatron.observability.metrics import MetricsWriter, read_metrics
from prism_megatron.observability.summary import RunFacts, summarise, write_summary
from prism_megatron.parallel.collectives import on_main
from prism_megatron.run.advice import how_to_go_on
from prism_megatron.run.checkpoints import Checkpoints
from prism_megatron.run.folder import CHECKPOINTS, METRICS, REPORT, SUMMARY, folder_of_new_run
from prism_megatron.run.idle import Idleness
from prism_megatron.run.peers import Peers
from prism_megatron.run.session import Session
from prism_megatron.run.stage import Artefacts, Stage
from prism_megatron.run.start import ConfigT, StageConfig, Start, find_start, settle

Build = Callable[[ConfigT, Session], Stage]


def drive(world: World, config: ConfigT, build: Build[ConfigT], *, kind: str) -> None:
    """One whole run; ``kind`` names its stage, and a new run's folder. All ranks together.

    Raises PrismError for bad input before anything is trained or written, and where the finished stage names a problem;
    RunStopped where the run was asked to end; NothingTrainsError where nothing trains; LostRankError for a rank that is
    gone.
    """
    start = on_main(lambda: find_start(config, stage=kind))
    output = on_main(lambda: _claim(start.output, kind=kind))
    config = _with_output(config, output)
    checkpoints = Checkpoints(
        output, config.checkpoint.load, start.run, to_plain(config), keep_last=config.checkpoint.keep_last
    )
    session = Session(
        world, output, checkpoints=checkpoints, restored=start.restored, max_minutes=config.run.max_minutes
    )
    with session.stopping, _known_trouble(session), closing(build(config, session)) as stage:
        first_step = _restore(session, stage, config, start)
        on_main(lambda: _settle(session, config, start))
        session.is_settled = True
        stage.prepare(first_step)
        if stage.may_go_back and checkpoints.good_step is None:
            _save(session, stage, first_step, seed=config.seed, good=True)
        ended = play(session, stage, range(first_step, stage.total_steps), config)
        artefacts = None
        if ended is None:
            with writing(output):
                artefacts = stage.finish(output)
        on_main(lambda: _report(session, stage, artefacts, ended))
    if ended is not None:
        raise ended
    if artefacts is not None and artefacts.problem is not None:
        raise PrismError(artefacts.problem)


def play(session: Session, stage: Stage, steps: range, config: StageConfig) -> PrismError | None:
    """All ``steps``, or fewer where the stage stops, with a row, a line of the table and checkpoints.

    Returns what ended the run before its time, if anything did: somebody's wish, or that nothing trains.
    """
    if (reason := _why_no_step_is_left(stage, steps)) is not None:
        session.say(reason)
        return None
    session.say(f"{stage.name}: steps {steps.start + 1} to {steps.stop}")
    session.begin_table(stage.columns, total_steps=steps.stop)
    idleness = Idleness(config.run.max_idle_steps)
    saved = steps.start
    good = True
    with closing(_Rows(session, first_step=steps.start)) as rows:
        for step in steps:
            if (wish := session.stopping.agreed()) is not None:
                if step > saved:
                    _save(session, stage, step, seed=config.seed, good=good)
                return _stopped(session, wish, step)
            outcome = stage.play(step)
            rows.write({**outcome.row, **{f"seconds/{phase}": s for phase, s in session.timers.take().items()}})
            for line in (*outcome.lines, *idleness.see(outcome.learned, outcome.idle)):
                session.say(line)
            done, good, stops = step + 1, outcome.good, outcome.verdict == "stop"
            if (verdict := idleness.verdict) is not None:
                return NothingTrainsError(f"stopped after step {done}: {verdict}")
            if done % config.checkpoint.save_every == 0 or done == steps.stop or stops:
                _save(session, stage, done, seed=config.seed, good=good)
                saved = done
            if stops:
                break
    if idleness.never_trained:
        role, reason = next(iter(idleness.never_trained.items()))
        return NothingTrainsError(f"no step of {len(steps)} trained the {role}: {reason}")
    return None


def _why_no_step_is_left(stage: Stage, steps: range) -> str | None:
    if not steps:
        return f"all {steps.stop} steps are played: nothing is left to train, and --steps asks for more"
    return stage.finished()


class _Rows:
    """Where a step's figures go."""

    def __init__(self, session: Session, *, first_step: int) -> None:
        self._session = session
        path = session.output / METRICS
        self._writer = MetricsWriter(path, first_step=first_step) if session.world.is_main else None

    def write(self, row: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.write(row)
        self._session.show(row)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _claim(output: Path | None, *, kind: str) -> Path:
    """The run's folder, which is there afterwards."""
    with writing(output or Path("runs")):
        if output is None:
            return folder_of_new_run(kind)
        output.mkdir(parents=True, exist_ok=True)
        return output


def _restore(session: Session, stage: Stage, config: StageConfig, start: Start) -> int:
    """The step to begin with, with the weights of the checkpoint that the run goes on from."""
    if start.saved is None:
        return 0
    step = session.checkpoints.restore(stage, start.saved, seed=config.seed, change=config.run.change)
    session.say(f"restored {' and '.join(stage.engines())} from {start.restored}")
    return step


def _settle(session: Session, config: StageConfig, start: Start) -> None:
    """From here on the run is one: say how it is configured, and write that down."""
    with writing(session.output):
        settle(config, start)
    if start.saved is None:
        print(to_yaml(config), flush=True)
    for line in start.lines:
        session.say(line)
    advise(how_to_go_on(session.output))


def _stopped(session: Session, wish: str, step: int) -> RunStopped:
    played = f"after step {step}" if step else "before the first step"
    return RunStopped(f"stopped by {wish} {played}; {how_to_go_on(session.output)}")


def _save(session: Session, stage: Stage, step: int, *, seed: int, good: bool) -> None:
    started = time.perf_counter()
    with session.phase("checkpoint"):
        folder = session.checkpoints.save(stage, step, seed=seed, good=good)
    session.say(f"saved {folder} in {time.perf_counter() - started:.1f} s")
    advise(how_to_go_on(session.output))


def _report(session: Session, stage: Stage, artefacts: Artefacts | None, ended: PrismError | None) -> None:
    """Write summary and, for a stage that has one, the report; on the main rank."""
    output, world = session.output, session.world
    rows = read_metrics(output / METRICS) if (output / METRICS).exists() else []
    facts = RunFacts(
        world_size=world.world_size,
        layout=world.layout,
        hf_export=None if artefacts is None else str(artefacts.export),
        checkpoint=str(latest(output / CHECKPOINTS)),
        megatron_core=version("megatron-core"),
        torch=torch.__version__,
        other_seconds=session.other_seconds,
    )
    summary = {**summarise(rows, facts), **stage.summarise(rows)}
    if artefacts is not None:
        summary |= {"exported": artefacts.exported, **artefacts.figures}
    summary["ended"] = "done" if ended is None else str(ended)
    with writing(output):
        write_summary(output / SUMMARY, summary)
    written = [str(output / SUMMARY)]
    if artefacts is not None and artefacts.samples is not None:
        write_report(output / REPORT, title=artefacts.title, rows=rows, summary=summary, samples=artefacts.samples)
        written.append(str(output / REPORT))
    if ended is None:
        session.say(f"done: {', '.join((*written, str(facts.checkpoint), str(facts.hf_export)))}")


@contextmanager
def _known_trouble(session: Session) -> Iterator[None]:
    """Give what can befall a run from outside one line, which says how to go on."""
    peers = Peers.meet(session.world.rank)
    try:
        yield
    except PrismError as error:
        if session.is_settled and not isinstance(error, RunStopped | NothingTrainsError):
            raise type(error)(f"{error}; {how_to_go_on(session.output)}") from error
        raise
    except Exception as error:
        if (full := disk_error(error, session.output)) is not None:
            raise type(full)(f"{full}; make room, then {how_to_go_on(session.output)}") from error
        if peers.gone():
            raise LostRankError(
                f"{peers.describe_loss()}; {how_to_go_on(session.output)}", speaker=peers.speaker()
            ) from error
        raise


def _with_output(config: Any, output: Any) -> Any:
    """The configuration with the folder that the run really has."""
    return replace(config, checkpoint=replace(config.checkpoint, output=output))
