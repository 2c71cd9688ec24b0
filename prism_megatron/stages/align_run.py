"""One alignment run from configuration to artefacts: build, play, save, export, report."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from prism_megatron.config.align import AlignConfig
from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.merge import save, to_yaml
from prism_megatron.config.validate import check_world
from prism_megatron.engine import checkpoint
from prism_megatron.engine.runtime import World, start, stop
from prism_megatron.errors import CheckpointError
from prism_megatron.evaluation.report import write_report
from prism_megatron.observability.metrics import MetricsWriter, read_metrics
from prism_megatron.observability.progress import Progress
from prism_megatron.observability.summary import RunFacts, summarise, write_summary
from prism_megatron.observability.timers import PhaseTimers
from prism_megatron.parallel.collectives import broadcast_object
from prism_megatron.stages.align import AlignStep, align
from prism_megatron.stages.align_build import AlignRun, build_run
from prism_megatron.stages.align_metrics import report_samples, step_row
from prism_megatron.stages.assembly import export_folder

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
    check_world(config.parallel, int(os.environ.get("WORLD_SIZE", "1")))
    world = start(config.parallel, seed=config.seed)
    output = broadcast_object(_run_folder(config.checkpoint), source=0)
    config = replace(config, checkpoint=replace(config.checkpoint, output=output))
    session = Session(config, world, output)
    if world.is_main:
        output.mkdir(parents=True, exist_ok=True)
        save(config, output / CONFIG)
        print(to_yaml(config), flush=True)
    layout = " ".join(f"{axis}{size}" for axis, size in world.layout.items())
    with session.phase("build", f"building both players on {world.world_size} ranks ({layout}); run folder {output}"):
        run = build_run(config, world, say=session.say)
        first_step = _resume(session, run)
    with session.phase("weight_sync", "handing the policy's weights to the rollout replicas"):
        run.players.rollout.update_weights(run.players.policy.export_hf(), first_step)
    last = _play(session, run, first_step)
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
        last[:] = [step]
        done = step.step + 1
        if done % config.checkpoint.save_every == 0 or done == config.steps:
            _save(session, run, done)

    session.say(f"aligning: steps {first_step + 1} to {config.steps}")
    align(
        run.players,
        run.prompts.batch,
        run.plan,
        world=world,
        steps=range(first_step, config.steps),
        timers=session.timers,
        on_step=on_step,
    )
    if writer is not None:
        writer.close()
    return last[0] if last else None


def _save(session: Session, run: AlignRun, step: int) -> None:
    folder = checkpoint.step_folder(session.output / CHECKPOINTS, step)
    started = time.perf_counter()
    checkpoint.save(folder, run.players.engines(), {"step": step, "seed": session.config.seed})
    seconds = time.perf_counter() - started
    session.other_seconds["checkpoint"] = session.other_seconds.get("checkpoint", 0.0) + seconds
    session.say(f"saved {folder} in {seconds:.1f} s")


def _resume(session: Session, run: AlignRun) -> int:
    """Restore both players from ``--load``; the step to go on with, 0 without a checkpoint.

    Raises CheckpointError when there is none, or when it belongs to a run with another seed: its data and samples
    would not be those of an uninterrupted run.
    """
    root = session.config.checkpoint.load
    if root is None:
        return 0
    folder = broadcast_object(checkpoint.latest(root) or checkpoint.latest(root / CHECKPOINTS), source=0)
    if folder is None:
        raise CheckpointError(
            f"--load {root} holds no complete checkpoint; give a run folder or one of its step_* folders"
        )
    state = checkpoint.load(folder, run.players.engines())
    if state["step"] >= session.config.steps:
        raise CheckpointError(f"{folder} has all of the {session.config.steps} steps; ask for more with --steps")
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
    title = f"Alignment of {run.folder.name} against its discriminator"
    write_report(output / REPORT, title=title, rows=rows, summary=summary, samples=samples)
    session.say(f"done: {output / SUMMARY}, {output / REPORT}, {facts.checkpoint}, {facts.hf_export}")


def _run_folder(config: CheckpointConfig) -> Path:
    """``--output``; else the run that ``--load`` goes on with; else a new folder."""
    if config.output is not None:
        return config.output
    if config.load is not None and (config.load / CHECKPOINTS).is_dir():
        return config.load
    return Path("runs") / time.strftime("align-%Y%m%d-%H%M%S")
