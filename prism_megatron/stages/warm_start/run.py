"""One warm-start from configuration to artefacts: build, train, save, export, and say whether the gate is passed."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.metadata import version

import torch

from model_providers.moe_discriminator.folder import check_kind_of
from model_providers.moe_discriminator.variant import Variant
from prism_megatron.config.merge import save, to_yaml
from prism_megatron.config.warm_start import WarmStartConfig
from prism_megatron.conversion.checkpoint_folder import companions_folder
from prism_megatron.data.render import Renderer
from prism_megatron.engine import checkpoint
from prism_megatron.engine.runtime import World, start, stop
from prism_megatron.errors import CheckpointError, ConfigError
from prism_megatron.evaluation.health import Figures
from prism_megatron.game.figures import game_row
from prism_megatron.observability.metrics import MetricsWriter, read_metrics
from prism_megatron.observability.summary import RunFacts, summarise, write_summary
from prism_megatron.run.session import (
    CHECKPOINTS,
    CONFIG,
    EXPORT,
    METRICS,
    SUMMARY,
    Session,
    checkpoint_to_load,
    claim_run_folder,
    step_of,
)
from prism_megatron.stages.align.rows import Row, cost_row, share
from prism_megatron.stages.warm_start.build import (
    Sources,
    WarmStartRun,
    build_sources,
    build_warm_start,
    held_out_pairs,
    step_pairs,
)
from prism_megatron.stages.warm_start.gate import check_gate, described, measure
from prism_megatron.stages.warm_start.pair_writer import PairWriter
from prism_megatron.stages.warm_start.stage import WarmStartStep, warm_start
from prism_megatron.training.roles import export_folder
from prism_megatron.types import Rollout

STAGE = "warm-start"


def run_warm_start(config: WarmStartConfig) -> None:
    """Everything ``tools/run_warm_start.py`` does, on one rank."""
    world = start(config.parallel, seed=config.seed)
    warm_up_on(world, config)
    stop(world)


def warm_up_on(world: World, config: WarmStartConfig) -> None:
    """The run on a world that is there. Raises PrismError at its very end where the gate is not passed."""
    output = claim_run_folder(config.checkpoint, world, kind=STAGE)
    restored = checkpoint_to_load(config.checkpoint.load, output)
    config = replace(config, checkpoint=replace(config.checkpoint, output=output))
    if world.is_main:
        save(config, output / CONFIG)
        print(to_yaml(config), flush=True)
    sources = build_sources(config)
    session = Session(config, world, output, total_steps=sources.steps)
    layout = " ".join(f"{axis}{size}" for axis, size in world.layout.items())
    session.say(f"run folder {output}; {sources.steps} steps on {sources.train_text}")
    with session.phase("build", f"building the discriminator on {world.world_size} ranks ({layout})"):
        run = build_warm_start(config, sources, world, say=session.say)
        first_step = 0
        if restored is not None:
            files = companions_folder(restored, "discriminator")
            check_kind_of(files, Variant.of(config.discriminator), where=restored, flag="--load")
            state = checkpoint.load(restored, {"discriminator": run.discriminator})
            if state.get("stage") != STAGE:
                raise CheckpointError(
                    f"{restored} was not saved by a warm-start; to begin with its discriminator, name it with "
                    "--discriminator"
                )
            first_step = step_of(state, restored, steps=sources.steps, seed=config.seed)
            session.say(f"restored the discriminator from {restored}")
    _train(session, sources, run, range(first_step, sources.steps))
    held_out: Figures | None = None
    if sources.held_out is not None:
        with session.phase("held_out", "scoring held-out pairs"):
            pairs = held_out_pairs(config, sources.held_out, run, world=world)
            held_out = measure(run.discriminator, pairs, run.plan, sources.renderer, world=world)
        session.say(f"held out: {described(held_out)}")
    if run.rollout is not None:
        run.rollout.close()
    _finish(session, run, held_out)
    if held_out is not None:
        check_gate(held_out, min_auc=config.gate.min_auc, min_accuracy=config.gate.min_accuracy)


def _train(session: Session[WarmStartConfig], sources: Sources, run: WarmStartRun, steps: range) -> None:
    """All ``steps``, with metrics, the live table, checkpoints and, where asked for, the pairs on disk."""
    if not steps:
        return
    config, world = session.config, session.world
    written = config.pairs.write_pairs
    if written is not None and written.exists():
        raise ConfigError(f"--write-pairs {written} exists; remove it, or give another file")
    writer = MetricsWriter(session.output / METRICS, first_step=steps.start) if world.is_main else None
    pair_writer = None
    if written is not None and world.is_main:
        pair_writer = PairWriter(written, sources.renderer, fresh=steps.start == 0)

    def on_step(step: WarmStartStep) -> None:
        row = step_row(step, sources.renderer)
        if pair_writer is not None:
            row["written_pairs"] = pair_writer.write(step.step, step.pairs.examples, step.pairs.groups)
        row |= {f"seconds/{phase}": seconds for phase, seconds in session.timers.take().items()}
        if writer is not None:
            writer.write(row)
        session.show(row)
        done = step.step + 1
        if done % config.checkpoint.save_every == 0 or done == steps.stop:
            _save(session, run, done)

    session.say(f"warming up: steps {steps.start + 1} to {steps.stop}")
    with step_pairs(config, sources, run, world=world, steps=steps) as pairs:
        warm_start(run.discriminator, pairs, run.plan, world=world, steps=steps, timers=session.timers,
                   on_step=on_step)  # fmt: skip
    if pair_writer is not None:
        pair_writer.close(steps.stop)
    if writer is not None:
        writer.close()


def step_row(step: WarmStartStep, renderer: Renderer) -> Row:
    """Figures of the whole step, equal on every rank; scores are those before its update."""
    groups, judgement = step.pairs.groups, step.judgement
    answers = [answer for group in groups for answer in group.rollouts]
    num_valid = sum(len(group.valid_rollouts) for group in groups)
    row: Row = {
        "step": step.step,
        "rollouts": len(answers),
        "valid_rollouts": num_valid,
        "valid_share": share(num_valid, len(answers)),
        "truncated_rollouts": sum(isinstance(one, Rollout) and one.finish_reason == "length" for one in answers),
        "response_tokens": sum(len(answer.token_ids) for answer in answers),
    }
    row |= game_row(groups, judgement, step.pairs.rights(renderer))
    row |= cost_row(judgement.cost, pairs=num_valid)
    result = judgement.result
    row["discriminator_grad_norm"] = None if result is None else result.grad_norm
    row["discriminator_lr"] = None if result is None else result.lr
    row["discriminator_updated"] = None if result is None else int(result.updated)
    return row


def _save(session: Session[WarmStartConfig], run: WarmStartRun, step: int) -> None:
    folder = checkpoint.step_folder(session.output / CHECKPOINTS, step)
    started = time.perf_counter()
    state = {"step": step, "seed": session.config.seed, "stage": STAGE}
    checkpoint.save(folder, {"discriminator": run.discriminator}, state, models={"discriminator": run.files})
    seconds = time.perf_counter() - started
    session.other_seconds["checkpoint"] = session.other_seconds.get("checkpoint", 0.0) + seconds
    session.say(f"saved {folder} in {seconds:.1f} s")


def _finish(session: Session[WarmStartConfig], run: WarmStartRun, held_out: Figures | None) -> None:
    """Export the discriminator, then write the summary, whether the gate is passed or not."""
    output, world = session.output, session.world
    with session.phase("export", f"exporting the discriminator to {output / EXPORT}"):
        newest = checkpoint.latest(output / CHECKPOINTS)
        assert newest is not None, "the last step is always saved"
        like = companions_folder(newest, "discriminator")
        export_folder(run.discriminator, output / EXPORT, like=like, world=world)
    if not world.is_main:
        return
    facts = RunFacts(
        world_size=world.world_size,
        layout=world.layout,
        hf_export=str(output / EXPORT),
        checkpoint=str(newest),
        megatron_core=version("megatron-core"),
        torch=torch.__version__,
        other_seconds=session.other_seconds,
    )
    summary = summarise(read_metrics(output / METRICS), facts)
    summary["held_out"] = held_out
    write_summary(output / SUMMARY, summary)
    session.say(f"done: {output / SUMMARY}, {facts.checkpoint}, {facts.hf_export}")
