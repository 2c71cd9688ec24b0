"""One alignment run from configuration to artefacts: build, play, save, export, report."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from prism_megatron.config.align import AlignConfig
from prism_megatron.config.merge import save, to_yaml
from prism_megatron.engine import checkpoint
from prism_megatron.engine.runtime import start, stop
from prism_megatron.errors import CheckpointError
from prism_megatron.evaluation.report import write_report
from prism_megatron.observability.metrics import MetricsWriter, read_metrics
from prism_megatron.observability.summary import RunFacts, summarise, write_summary
from prism_megatron.stages.align import AlignStep, align
from prism_megatron.stages.align_build import AlignRun, build_run
from prism_megatron.stages.align_metrics import gap_alarms, report_samples, step_row
from prism_megatron.stages.assembly import export_folder
from prism_megatron.stages.rollout_queue import RolloutQueue
from prism_megatron.stages.session import (
    CHECKPOINTS,
    CONFIG,
    EXPORT,
    METRICS,
    REPORT,
    SUMMARY,
    Session,
    checkpoint_to_load,
    claim_run_folder,
    step_of,
)


def run_alignment(config: AlignConfig) -> None:
    """Everything ``tools/run_align.py`` does, on one rank."""
    world = start(config.parallel, seed=config.seed)
    output = claim_run_folder(config.checkpoint, world, kind="align")
    restored = checkpoint_to_load(config.checkpoint.load, output)
    config = replace(config, checkpoint=replace(config.checkpoint, output=output))
    session = Session(config, world, output, total_steps=config.steps)
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


def _play(session: Session[AlignConfig], run: AlignRun, first_step: int) -> AlignStep | None:
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


def _save(session: Session[AlignConfig], run: AlignRun, step: int) -> None:
    folder = checkpoint.step_folder(session.output / CHECKPOINTS, step)
    started = time.perf_counter()
    state = {"step": step, "seed": session.config.seed}
    checkpoint.save(folder, run.players.engines(), state, models=run.models)
    seconds = time.perf_counter() - started
    session.other_seconds["checkpoint"] = session.other_seconds.get("checkpoint", 0.0) + seconds
    session.say(f"saved {folder} in {seconds:.1f} s")


def _restore(session: Session[AlignConfig], run: AlignRun, folder: Path) -> int:
    """Load both players; the step to go on with. Raises CheckpointError for another run's checkpoint."""
    state = checkpoint.load(folder, run.players.engines())
    if not {"step", "seed"} <= state.keys():
        raise CheckpointError(f"{folder} was not saved by an alignment run: it holds {sorted(state)}")
    step = step_of(state, folder, steps=session.config.steps, seed=session.config.seed)
    session.say(f"restored both players from {folder}")
    return step


def _finish(session: Session[AlignConfig], run: AlignRun, last: AlignStep | None) -> None:
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
