"""Plays a stage from its configuration to its artefacts: begin, build, restore, play, save, finish, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prism_megatron.config.merge import to_plain, to_yaml
from prism_megatron.disk import disk_error, writing
from prism_megatron.engine.host.garbage import GarbageCollection
from prism_megatron.engine.launch import advise
from prism_megatron.engine.runtime import World
from prism_megatron.errors import DiskError, LostRankError, NothingTrainsError, PrismError, RunStopped
from prism_megatron.observability import start_up
from prism_megatron.observability.metrics import MetricsWriter
from prism_megatron.parallel.collectives import on_main
from prism_megatron.run.advice import how_to_go_on
from prism_megatron.run.checkpoints import Checkpoints
from prism_megatron.run.ending.idle import Idleness
from prism_megatron.run.ending.peers import Peers
from prism_megatron.run.files import METRICS
from prism_megatron.run.folder import folder_of_new_run, move_aside, move_over, remove_halves
from prism_megatron.run.readings import readings
from prism_megatron.run.record import RunRecord
from prism_megatron.run.reporting import OpenSinks, Reporter
from prism_megatron.run.session import Session
from prism_megatron.run.sinks import Sink, check_sinks, open_sinks
from prism_megatron.run.stage import Outcome, Stage
from prism_megatron.run.start import ConfigT, StageConfig, Start, find_start, set_aside, settle, without_command

Build = Callable[[ConfigT, Session], Stage]


def drive(world: World, config: ConfigT, build: Build[ConfigT], *, kind: str) -> None:
    """One whole run; ``kind`` names its stage, and a new run's folder. All ranks together.

    Raises PrismError for bad input before anything is trained or written, and where the finished stage names a problem;
    RunStopped where the run was asked to end; NothingTrainsError where nothing trains; LostRankError for a rank that is
    gone.
    """
    check_sinks(config.run.log_to)
    start = on_main(lambda: find_start(config, stage=kind))
    output, is_new = on_main(lambda: _claim(start, kind=kind))
    config = _with_output(config, output)
    checkpoints = Checkpoints(
        output,
        config.checkpoint.load,
        start.run,
        to_plain(without_command(config)),
        keep_last=config.checkpoint.keep_last,
        save_async=config.checkpoint.save_async,
    )
    session = Session(
        world, output, checkpoints=checkpoints, restored=start.restored, max_minutes=config.run.max_minutes
    )
    session.idleness = Idleness(config.run.max_idle_steps)
    if start.saved is not None:
        session.idleness.restore(start.saved.state["idle"])
    session.begin()
    reporting = partial(Reporter, session, every=config.run.report_every, open_sinks=_sinks_of(config, session))
    with (
        session.stopping,
        closing(session),
        _known_trouble(session, is_new=is_new),
        closing(build(config, session)) as stage,
        reporting(stage) as reporter,
    ):
        start_up.mark("build")
        first_step = _restore(session, stage, config, start)
        on_main(lambda: _settle(session, config, start))
        session.is_settled = True
        start_up.mark("restore")
        stage.prepare(first_step)
        start_up.mark("prepare")
        if stage.may_go_back and checkpoints.good_step is None:
            _save(session, stage, first_step, seed=config.seed, good=True)
        ended = play(session, stage, range(first_step, stage.total_steps), config, reporter)
        _settle_save(session)
        if ended is not None:
            session.note(str(ended))
            on_main(lambda: reporter.stop(str(ended)))
            raise ended
        with writing(output):
            artefacts = stage.finish(output)
        on_main(lambda: reporter.finish(artefacts))
    if artefacts.problem is not None:
        raise PrismError(artefacts.problem)


def play(session: Session, stage: Stage, steps: range, config: StageConfig, reporter: Reporter) -> PrismError | None:
    """All ``steps``, or fewer where the stage stops, with a row, a line of the table and checkpoints.

    Returns what ended the run before its time, if anything did: somebody's wish, or that nothing trains.
    """
    if (reason := _why_no_step_is_left(stage, steps)) is not None:
        session.say(reason)
        return _nothing_trained(session, steps)
    session.say(f"{stage.name}: steps {steps.start + 1} to {steps.stop}")
    session.begin_table(stage.view.columns, total_steps=steps.stop)
    idleness, saved, good = session.idleness, steps.start, True
    on_main(lambda: reporter.begin(steps.start))
    garbage = GarbageCollection()
    with (
        closing(_Rows(session, reporter, first_step=steps.start, timings=config.run.timings)) as rows,
        closing(garbage),
    ):
        garbage.begin(config.run.manual_gc)
        for step in steps:
            if (wish := session.stopping.agreed()) is not None:
                if step > saved:
                    _save(session, stage, step, seed=config.seed, good=good)
                _settle_save(session)
                return _stopped(session, wish, step)
            session.activity.step = step + 1
            garbage.before_step()
            outcome = stage.play(step)
            rows.write(outcome)
            for line in (*outcome.lines, *idleness.see(outcome.learned, outcome.idle)):
                session.say(line)
            _note_saved(session, session.checkpoints.poll())
            done, good, stops = step + 1, outcome.good, outcome.verdict == "stop"
            if (verdict := idleness.verdict) is not None:
                return NothingTrainsError(f"stopped after step {done}: {verdict}")
            if done % config.checkpoint.save_every == 0 or done == steps.stop or stops:
                _save(session, stage, done, seed=config.seed, good=good, best=outcome.best)
                saved = done
            if stops:
                break
    return _nothing_trained(session, steps)


def _nothing_trained(session: Session, steps: range) -> NothingTrainsError | None:
    """What a run at its end is told if a role was to learn, and no step, of this or an earlier part, trained it."""
    for role, reason in session.idleness.never_trained.items():
        return NothingTrainsError(f"no step of {steps.stop} trained the {role}: {reason}")
    return None


def _why_no_step_is_left(stage: Stage, steps: range) -> str | None:
    if not steps:
        return f"all {steps.stop} steps are played: nothing is left to train, and --steps asks for more"
    return stage.finished()


class _Rows:
    """Where a step's figures go."""

    def __init__(self, session: Session, reporter: Reporter, *, first_step: int, timings: bool) -> None:
        self._session, self._reporter = session, reporter
        self._tells_start = timings
        path = session.output / METRICS
        self._writer = MetricsWriter(path, first_step=first_step) if session.world.is_main else None

    def write(self, outcome: Outcome) -> None:
        session = self._session
        seconds = {f"seconds/{phase}": spent for phase, spent in session.timers.take().items()}
        row = {**outcome.row, **seconds, **readings(session.world)}
        if self._writer is not None:
            with writing(session.output / METRICS):
                self._writer.write(row)
            self._reporter.step(row)
        session.show(row)
        if self._tells_start:
            start_up.mark("first step")
            session.say(start_up.told())
            self._tells_start = False

    def close(self) -> None:
        self._session.activity.step = None
        if self._writer is not None:
            self._writer.close()


def _claim(start: Start, *, kind: str) -> tuple[Path, bool]:
    """The run's folder, which is there afterwards, and whether it was not before.

    What a killed try left half written is removed. What one without a checkpoint left is moved aside before anything is
    built into the folder, and so are checkpoints that are damaged.
    """
    output = start.output
    with writing(output or Path("runs")):
        if output is None:
            return folder_of_new_run(kind), True
        is_new = not output.exists()
        output.mkdir(parents=True, exist_ok=True)
        remove_halves(output)
        if start.begins_anew:
            move_aside(output)
        for damaged in start.damaged:
            move_over(damaged, set_aside(damaged))
        return output, is_new


def _restore(session: Session, stage: Stage, config: StageConfig, start: Start) -> int:
    """The step to begin with, with the weights of the checkpoint that the run goes on from."""
    if start.saved is None:
        return 0
    step = session.checkpoints.restore(stage, start.saved, seed=config.seed, change=config.run.change, say=session.say)
    session.say(f"restored {' and '.join(stage.engines())} from {start.restored}")
    return step


def _settle(session: Session, config: StageConfig, start: Start) -> None:
    """From here on the run is one: say how it is configured, and write that down."""
    with writing(session.output):
        settle(config, start)
        session.open()
    if start.saved is None:
        session.show_text(to_yaml(config))
    for line in start.lines:
        session.say(line)
    advise(how_to_go_on(session.output))


def _stopped(session: Session, wish: str, step: int) -> RunStopped:
    played = f"after step {step}" if step else "before the first step"
    return RunStopped(f"stopped by {wish} {played}; {how_to_go_on(session.output)}")


def _save(session: Session, stage: Stage, step: int, *, seed: int, good: bool, best: bool = False) -> None:
    _settle_save(session)
    started, idle = time.perf_counter(), session.idleness.to_plain()
    with session.phase("checkpoint"):
        folder = session.checkpoints.save(stage, step, seed=seed, good=good, best=best, idle=idle)
    spent = time.perf_counter() - started
    if session.checkpoints.under_way is not None:
        session.say(f"copied {folder} in {spent:.1f} s, to be written beside the next steps")
        return
    session.say(f"saved {folder} in {spent:.1f} s")
    advise(how_to_go_on(session.output))


def _settle_save(session: Session) -> None:
    """Wait for the checkpoint that is being written, if there is one."""
    if session.checkpoints.under_way is None:
        return
    with session.phase("checkpoint"):
        folder = session.checkpoints.settle()
    _note_saved(session, folder)


def _note_saved(session: Session, folder: Path | None) -> None:
    """Say that a checkpoint that was written beside the steps is there."""
    if folder is not None:
        session.say(f"saved {folder}")
        advise(how_to_go_on(session.output))


def _sinks_of(config: StageConfig, session: Session) -> OpenSinks:
    run, say = config.run, session.say

    def opened(record: RunRecord, first_step: int) -> Sequence[Sink]:
        return open_sinks(run.log_to, folder=session.output, record=record, first_step=first_step,
                          run_name=run.run_name, config=to_plain(config), say=say)  # fmt: skip

    return opened


@contextmanager
def _known_trouble(session: Session, *, is_new: bool) -> Iterator[None]:
    """Give what can befall a run from outside one line, which says how to go on; leave no folder of a refused start."""
    with closing(Peers.meet(session.world.rank)) as peers, _one_line(session, peers, is_new=is_new):
        yield


@contextmanager
def _one_line(session: Session, peers: Peers, *, is_new: bool) -> Iterator[None]:
    try:
        yield
    except (RunStopped, NothingTrainsError):
        raise
    except PrismError as error:
        if not session.is_settled:
            if session.world.is_main and is_new:
                with suppress(OSError):
                    session.output.rmdir()  # one that holds anything stays
            raise
        room = "make room, then " if disk_error(error, session.output) is not None else ""
        said = f"{error}; {room}{how_to_go_on(session.output)}"
        session.note(f"error: {said}")
        raise type(error)(said) from error
    except Exception as error:
        if (full := disk_error(error, session.output)) is not None:
            raise DiskError(f"{full}; make room, then {how_to_go_on(session.output)}") from error
        if (loss := peers.loss(error)) is not None:
            said = f"{loss.text}; {how_to_go_on(session.output)}"
            session.note(f"error: {said}")
            raise LostRankError(said, speaker=loss.speaker) from error
        raise


def _with_output(config: Any, output: Any) -> Any:
    """The configuration with the folder that the run really has."""
    return replace(config, checkpoint=replace(config.checkpoint, output=output))
