"""One alignment run from configuration to artefacts: build, play, save, export, report."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from prism_megatron.config.align import AlignConfig
from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.merge import save, to_yaml
from prism_megatron.engine import checkpoint
from prism_megatron.engine.runtime import World, start, stop
from prism_megatron.errors import CheckpointError, ConfigError
from prism_megatron.evaluation.report import write_report
from prism_megatron.observability.metrics import MetricsWriter, read_metrics
from prism_megatron.observability.progress import Progress
from prism_megatron.observability.summary import RunFacts, summarise, write_summary
from prism_megatron.observability.timers import PhaseTimers
from prism_megatron.parallel.collectives import broadcast_object
from prism_megatron.stages.align import AlignStep, align
from prism_megatron.stages.align_build import AlignRun, build_run
from prism_megatron.stages.align_metrics import gap_alarms, report_samples, step_row
from prism_megatron.stages.assembly import export_folder
from prism_megatron.stages.rollout_queue import RolloutQueue

METRICS, SUMMARY, REPORT, CONFIG = "metrics.jsonl", "summary.json", "report.html", "config.yaml"
CHECKPOINTS, EXPORT = "checkpoints", "hf"


class Session:
    """What the parts of one run share: its folder, its clocks and its progress lines (main rank only)."""

    def __init__(self, config: AlignConfig, world: World, output: Path) -> None:
        self.config = config
        self.world = world
        self.output = output
        self.timers = PhaseTimers()
        self.other_seconds: dict[str, float] = {}
        self._progress = Progress(total_steps=config.steps)

    def say(self, text: str) -> None:
        """One line with the seconds so far."""
        if self.world.is_main:
            self._progress.phase(text)

    @contextmanager
    def phase(self, name: str, text: str) -> Iterator[None]:
        """Say that a phase outside the steps begins, and time it."""
        self.say(text)
        started = time.perf_counter()
        yield
        self.other_seconds[name] = self.other_seconds.get(name, 0.0) + time.perf_counter() - started

    def show(self, row: dict[str, float | int | None]) -> None:
        """One line of the live table."""
        if self.world.is_main:
            self._progress.row(row)


def run_alignment(config: AlignConfig) -> None:
    """Everything ``tools/run_align.py`` does, on one rank."""
    world = start(config.parallel, seed=config.seed)
    output = _claim_run_folder(config.checkpoint, world)
    restored = _checkpoint_to_load(config.checkpoint.load, output)
    config = replace(config, checkpoint=replace(config.checkpoint, output=output))
    session = Session(config, world, output)
    if world.is_main:
        save(config, output / CONFIG)
        print(to_yaml(config), flush=True)
    layout = " ".join(f"{axis}{size}" for axis, size in world.layout.items())
    with session.phase("build", f"building both players on {world.world_size} ranks ({layout}); run folder {output}"):
        run = build_run(config, world, fresh=restored is None, say=session.say)
        first_step = 0 if restored is None else _restore(session, run, restored)
    with session.phase("weight_sync", "handing the policy's weights to the rollout engine"):
        run.players.rollout.update_weights(run.players.policy.export_hf(), first_step)
    last = _play(session, run, first_step) if first_step < config.steps else None
    run.players.rollout.close()
    _finish(session, run, last)
    stop(world)


def _play(session: Session, run: AlignRun, first_step: int) -> AlignStep | None:
    """All steps from ``first_step``, with metrics, the live table and checkpoints; returns the last one."""
    config, world = session.config, session.world
    writer = MetricsWriter(session.output / METRICS, first_step=first_step) if world.is_main else None
    last: list[AlignStep] = []

    def on_step(step: AlignStep) -> None:
        row = step_row(step, run.renderer)
        row |= {f"seconds/{phase}": seconds for phase, seconds in session.timers.take().items()}
        if writer is not None:
            writer.write(row)
        session.show(row)
        for alarm in gap_alarms(row, config.rollout.logprob_gap_alarm):
            session.say(alarm)
        last[:] = [step]
        done = step.step + 1
        if done % config.checkpoint.save_every == 0 or done == config.steps:
            _save(session, run, done)

    session.say(f"aligning: steps {first_step + 1} to {config.steps}")
    steps = range(first_step, config.steps)
    queue = RolloutQueue(
        run.players.rollout,
        run.prompts.batch,
        run.plan.sampling,
        n=run.plan.rollouts_per_prompt,
        seed=run.plan.seed,
        world=world,
        steps=steps,
        ahead=config.rollout.rollout_ahead,
    )
    with closing(queue):
        align(run.players, queue, run.plan, world=world, steps=steps, timers=session.timers, on_step=on_step)
    if writer is not None:
        writer.close()
    return last[0] if last else None


def _save(session: Session, run: AlignRun, step: int) -> None:
    folder = checkpoint.step_folder(session.output / CHECKPOINTS, step)
    started = time.perf_counter()
    state = {"step": step, "seed": session.config.seed}
    checkpoint.save(folder, run.players.engines(), state, models=run.models)
    seconds = time.perf_counter() - started
    session.other_seconds["checkpoint"] = session.other_seconds.get("checkpoint", 0.0) + seconds
    session.say(f"saved {folder} in {seconds:.1f} s")


def _checkpoint_to_load(root: Path | None, output: Path) -> Path | None:
    """The checkpoint that ``--load`` means; None for a new run, and for one killed before its first checkpoint.

    Raises CheckpointError when ``root`` is neither a checkpoint nor a run folder, or when ``output`` holds newer
    checkpoints, which would be mixed with this run's.
    """
    if root is None:
        return None
    folder = broadcast_object(checkpoint.latest(root) or checkpoint.latest(root / CHECKPOINTS), source=0)
    if folder is None:
        if not (root / CONFIG).is_file():
            raise CheckpointError(f"--load {root} is neither a run folder nor a checkpoint; give one of those")
        return None
    newest = broadcast_object(checkpoint.latest(output / CHECKPOINTS), source=0)
    if newest is not None and newest.name > folder.name:
        raise CheckpointError(f"{newest} is newer than --load {folder}; remove it, or give another --output")
    return folder


def _restore(session: Session, run: AlignRun, folder: Path) -> int:
    """Load both players; the step to go on with.

    Raises CheckpointError when the checkpoint is past ``--steps``, or of another seed: its data and samples would not
    be those of an uninterrupted run.
    """
    state = checkpoint.load(folder, run.players.engines())
    if not {"step", "seed"} <= state.keys():
        raise CheckpointError(f"{folder} was not saved by an alignment run: it holds {sorted(state)}")
    if state["step"] > session.config.steps:
        raise CheckpointError(f"{folder} is past --steps {session.config.steps}; ask for at least {state['step']}")
    if state["seed"] != session.config.seed:
        raise CheckpointError(f"{folder} belongs to --seed {state['seed']}, this run has --seed {session.config.seed}")
    session.say(f"restored both players from {folder}")
    return int(state["step"])


def _finish(session: Session, run: AlignRun, last: AlignStep | None) -> None:
    """Export the aligned policy, then write summary and report."""
    output, world = session.output, session.world
    with session.phase("export", f"exporting the aligned policy to {output / EXPORT}"):
        export_folder(run.players.policy, output / EXPORT, like=run.folder, world=world)
    if not world.is_main:
        return
    rows = read_metrics(output / METRICS)
    facts = RunFacts(
        world_size=world.world_size,
        layout=world.layout,
        hf_export=str(output / EXPORT),
        checkpoint=str(checkpoint.latest(output / CHECKPOINTS)),
        megatron_core=version("megatron-core"),
        torch=torch.__version__,
        other_seconds=session.other_seconds,
    )
    summary = summarise(rows, facts)
    write_summary(output / SUMMARY, summary)
    samples = [] if last is None else report_samples(last, run.renderer)
    model = session.config.model.model
    title = f"Alignment of {'the mini' if model is None else Path(model).name} against its discriminator"
    write_report(output / REPORT, title=title, rows=rows, summary=summary, samples=samples)
    session.say(f"done: {output / SUMMARY}, {output / REPORT}, {facts.checkpoint}, {facts.hf_export}")


def _claim_run_folder(config: CheckpointConfig, world: World) -> Path:
    """The run's folder, made by the main rank and known to all.

    ``--output``; else the run that ``--load`` goes on with; else a new folder, which no other command can have taken.
    Raises ConfigError when a new run would write over an older one.
    """
    folder, problem = None, None
    if world.is_main:
        resumed = config.load if config.load is not None and (config.load / CONFIG).is_file() else None
        folder = config.output or resumed or _new_folder(Path("runs"), time.strftime("align-%Y%m%d-%H%M%S"))
        if config.load is None and ((folder / METRICS).exists() or (folder / CHECKPOINTS).exists()):
            problem = (
                f"--output {folder} holds an earlier run; go on with it by --load {folder}, or give another folder"
            )
        else:
            folder.mkdir(parents=True, exist_ok=True)
    folder, problem = broadcast_object((folder, problem), source=0)
    if problem is not None:
        raise ConfigError(problem)
    assert folder is not None
    return folder


def _new_folder(parent: Path, name: str) -> Path:
    """A folder that did not exist before: two commands started in the same second get two."""
    parent.mkdir(parents=True, exist_ok=True)
    for attempt in itertools.count(1):
        folder = parent / (name if attempt == 1 else f"{name}-{attempt}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("itertools.count has no end")
