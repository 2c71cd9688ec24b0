"""One alignment run from configuration to artefacts: build, play, save, export, report."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from model_providers.moe_discriminator.folder import check_kind_of
from model_providers.moe_discriminator.variant import Variant
from prism_megatron.config.align import AlignConfig
from prism_megatron.config.merge import save, to_yaml
from prism_megatron.conversion.checkpoint_folder import companions_folder
from prism_megatron.engine import checkpoint
from prism_megatron.engine.runtime import World, start, stop
from prism_megatron.errors import CheckpointError
from prism_megatron.evaluation.report import write_report
from prism_megatron.game.memory import GameMemory
from prism_megatron.game.probe_set import ProbeSet
from prism_megatron.observability.metrics import MetricsWriter, read_metrics
from prism_megatron.observability.summary import RunFacts, summarise, write_summary
from prism_megatron.parallel.collectives import broadcast_object
from prism_megatron.run.session import (
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
from prism_megatron.sampling.queue import RolloutQueue
from prism_megatron.stages.align.build import AlignRun, build_run
from prism_megatron.stages.align.rows import gap_alarms, report_samples, step_row, verdict_lines
from prism_megatron.stages.align.stage import AlignStep, align
from prism_megatron.training.roles import export_folder


def run_alignment(config: AlignConfig) -> None:
    """Everything ``tools/run_align.py`` does, on one rank."""
    world = start(config.parallel, seed=config.seed)
    align_on(world, config)
    stop(world)


def align_on(world: World, config: AlignConfig) -> None:
    """The run on a world that is there."""
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
        game = _Game(GameMemory.fresh(run.plan.game, seed=config.seed))
        first_step = 0 if restored is None else _restore(session, run, game, restored)
    with session.phase("weight_sync", "handing the policy's weights to the rollout engine"):
        rollout = run.players.rollout
        weights = run.players.policy.export_hf(run.plan.gather_bytes, layout=rollout.expert_layout)
        rollout.update_weights(weights, first_step)
        run.plan.check_served(first_step)
    _prepare(session, run, game, first_step)
    last = _play(session, run, game, first_step) if first_step < config.steps else None
    run.players.rollout.close()
    _finish(session, run, last)


@dataclass(eq=False)
class _Game:
    """What checkpoints keep of a run beside its players."""

    memory: GameMemory
    probe: ProbeSet | None = None
    good_step: int | None = None
    """the newest checkpoint that was saved outside a collapse: what a rollback goes back to"""

    def to_plain(self) -> dict[str, Any]:
        probe = None if self.probe is None else self.probe.to_plain()
        return {"memory": self.memory.to_plain(), "probe": probe, "good_step": self.good_step}


def _prepare(session: Session[AlignConfig], run: AlignRun, game: _Game, first_step: int) -> None:
    """What the rules need before the first step: a probe set, and a checkpoint to go back to."""
    config, world = session.config, session.world
    if run.probe_prompts is not None and game.probe is None:
        with session.phase("probe", "sampling the probe set"):
            game.probe = ProbeSet.draw(run.probe_prompts, run.players.rollout, run.plan, draw=config.steps, world=world)
    if config.game.rollbacks and game.good_step is None:
        _save(session, run, game, first_step)


def _play(session: Session[AlignConfig], run: AlignRun, game: _Game, first_step: int) -> AlignStep | None:
    """All steps from ``first_step``, with metrics, the live table and checkpoints; returns the last one."""
    config, world = session.config, session.world
    if game.memory.controls.finished:
        session.say("the reward gaps have settled: no step is left (--stop-gap-band)")
        return None
    writer = MetricsWriter(session.output / METRICS, first_step=first_step) if world.is_main else None
    last: list[AlignStep] = []

    def on_step(step: AlignStep) -> None:
        row = step_row(step, run.renderer)
        if game.probe is not None and step.step % config.game.probe_every == 0:
            with session.timers.phase("probe"):
                row |= game.probe.score(run.players, run.plan, run.renderer, world=world)
        row |= {f"seconds/{phase}": seconds for phase, seconds in session.timers.take().items()}
        if writer is not None:
            writer.write(row)
        session.show(row)
        for line in [*gap_alarms(row, config.rollout.logprob_gap_alarm), *verdict_lines(step, config.game)]:
            session.say(line)
        last[:] = [step]
        done = step.step + 1
        if done % config.checkpoint.save_every == 0 or done == config.steps or step.verdict == "stop":
            _save(session, run, game, done)

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
        align(
            run.players,
            queue,
            run.plan,
            game.memory,
            world=world,
            steps=steps,
            timers=session.timers,
            on_step=on_step,
            roll_back=partial(_roll_back, session, run, game),
        )
    if writer is not None:
        writer.close()
    return last[0] if last else None


def _save(session: Session[AlignConfig], run: AlignRun, game: _Game, step: int) -> None:
    folder = checkpoint.step_folder(session.output / CHECKPOINTS, step)
    started = time.perf_counter()
    if game.memory.controls.state.weak_steps == 0:
        game.good_step = step
    state = {"step": step, "seed": session.config.seed, "game": game.to_plain()}
    checkpoint.save(folder, run.players.engines(), state, models=run.models)
    seconds = time.perf_counter() - started
    session.other_seconds["checkpoint"] = session.other_seconds.get("checkpoint", 0.0) + seconds
    session.say(f"saved {folder} in {seconds:.1f} s")


def _roll_back(session: Session[AlignConfig], run: AlignRun, game: _Game) -> None:
    """Both players as in the newest good checkpoint, which the run that this one goes on from may have saved."""
    assert game.good_step is not None, "a run that may roll back saves its start"
    load = session.config.checkpoint.load
    roots = [session.output / CHECKPOINTS, *([] if load is None else [load / CHECKPOINTS, load, load.parent])]
    folders = [checkpoint.step_folder(root, game.good_step) for root in roots]
    found = broadcast_object([folder.is_dir() for folder in folders], source=0)
    if not any(found):
        raise CheckpointError(f"{folders[0]}, which a rollback goes back to, is gone; keep it or leave --rollbacks out")
    folder = folders[found.index(True)]
    checkpoint.load(folder, run.players.engines())
    session.say(f"both players are those of {folder} again")


def _restore(session: Session[AlignConfig], run: AlignRun, game: _Game, folder: Path) -> int:
    """Load both players and the game's memory; the step to go on with.

    Raises CheckpointError for another run's checkpoint, ConfigError for one with another kind of discriminator.
    """
    files = companions_folder(folder, "discriminator")
    check_kind_of(files, Variant.of(session.config.discriminator), where=folder, flag="--load")
    state = checkpoint.load(folder, run.players.engines())
    if not {"step", "seed", "game"} <= state.keys():
        raise CheckpointError(f"{folder} was not saved by an alignment run: it holds {sorted(state)}")
    step = step_of(state, folder, steps=session.config.steps, seed=session.config.seed)
    kept = state["game"]
    try:
        game.memory.restore(kept["memory"], run.prompts.batch)
        game.good_step = kept["good_step"]
        if run.probe_prompts is not None and kept["probe"] is not None:
            game.probe = ProbeSet.of_plain(kept["probe"], run.probe_prompts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the game that {folder} keeps is damaged, or of another version ({error!r}); load another step"
        ) from error
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
