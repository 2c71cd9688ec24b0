"""Builds an alignment from its configuration, which is taken apart here: below, functions get the parts they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from prism_megatron.advantages import ROUNDING
from prism_megatron.config.architecture.model import ALL_VISION
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.objective import PolicyObjective, recommended_correction
from prism_megatron.config.validate import towers_layout
from prism_megatron.conversion.checkpoints.folder import files_folder
from prism_megatron.conversion.checkpoints.model_names import policy_folder, title_of
from prism_megatron.data.loader import Example
from prism_megatron.data.reading.intake import NothingLeftError
from prism_megatron.data.render import Renderer
from prism_megatron.data.selection import read_selection
from prism_megatron.engine.host.capabilities import check_adam
from prism_megatron.engine.host.execution import Execution, execution_here
from prism_megatron.engine.optimizer import inner_optimizers
from prism_megatron.engine.runtime import World, with_experts
from prism_megatron.errors import DataError
from prism_megatron.game.discriminator import DiscriminatorOrigin
from prism_megatron.game.judge import JudgePlan
from prism_megatron.parallel.collectives import broadcast_object
from prism_megatron.rewards.rewarder import Rewarder
from prism_megatron.rollout.base import RolloutEngine
from prism_megatron.run.driver import drive
from prism_megatron.run.exports import Exports
from prism_megatron.run.session import Session
from prism_megatron.sampling.build import build_exam, build_handover, build_rollout, sampling_of
from prism_megatron.sampling.exam import Exam
from prism_megatron.sampling.queue import RolloutQueue
from prism_megatron.sampling.rewarding import reward
from prism_megatron.sampling.shares import RewardGroup
from prism_megatron.stages.align.plan import AlignPlan, Players, Prompts
from prism_megatron.stages.align.stage import Alignment
from prism_megatron.training.batches import BatchFormat
from prism_megatron.training.format_sft import FORMAT_SFT, teach_format
from prism_megatron.training.policy_update import UpdatePlan
from prism_megatron.training.prompts import (
    build_held_out,
    build_prompts,
    checks_of,
    look_together,
    renderer_of,
    say_counts,
)
from prism_megatron.training.roles import build_policy, model_files, resolve_dtype


def align_on(world: World, config: AlignConfig) -> None:
    """A whole run on a world that is there."""
    drive(world, config, build, kind=Alignment.name)


def build(config: AlignConfig, session: Session) -> Alignment:
    """Load both players; a run without a checkpoint teaches the format first where it is asked to.

    Raises ConfigError, DataError or ConversionError before anything is trained.
    """
    world = session.world
    text = f"building both players on {world.world_size} ranks ({session.layout_text}); run folder {session.output}"
    with session.phase("build", text):
        return _build(config, session)


def _build(config: AlignConfig, session: Session) -> Alignment:
    world, output, flags = session.world, session.output, config.discriminator
    # What is checked without a weight.
    model, scenes = config.model, config.data.data is None
    origin = DiscriminatorOrigin.of(flags, of_the_mini=model.model is None, mini=model.mini, scenes=scenes)
    # What a run's folder stands for may change between two ranks' looks at it.
    source, origin = broadcast_object((policy_folder(model.model, mini=model.mini), origin), source=0)
    folder = files_folder(source, "policy")
    shape = Qwen3VLShape.from_folder(folder)
    origin.check(folder)
    if session.restored is not None:
        origin.check_checkpoint(session.restored)
    dtype = resolve_dtype(config.model.dtype, shape)
    execution, capabilities = execution_here(
        config.recompute, config.precision, config.speed, world=world, dtype=dtype, say=session.say
    )
    if (advice := recommended_correction(config.correction, config.rollout)) is not None:
        session.say(advice)
    renderer = renderer_of(folder, config.data)
    prompts = _prompts(config, renderer, session)
    say_counts(prompts.steps.counts, None if prompts.probe is None else prompts.probe.counts, session.say)
    held_out = _held_out(config, renderer, session)
    rewarder = Rewarder(config.rewards, strict_format=config.data.strict_format, say=session.say) if held_out else None
    # The policy, and who samples for it.
    if config.data.format_sft and session.restored is None:
        source = _taught(config, source, shape, renderer, prompts, session=session, dtype=dtype, execution=execution)
    policy = build_policy(
        source,
        shape,
        world=world,
        dtype=dtype,
        optimizer=config.policy,
        total_steps=-(-config.steps // config.game.policy_update_every),
        freeze=ALL_VISION if config.model.freeze_policy_vision else (),
        execution=execution,
    )
    rollout = build_rollout(
        config.rollout, config.data, source, shape, renderer, output=output, world=world, dtype=dtype
    )
    # Its adversary.
    session.say(origin.size_line(shape))
    judges = with_experts(world, towers_layout(config, shape) or world.parallel)
    if judges is not world:
        session.say(f"discriminator: its experts are split over ep{judges.layout['ep']} etp{judges.layout['etp']}")
    discriminator = origin.build(
        source,
        shape,
        world=judges,
        dtype=dtype,
        optimizer=config.discriminator_optimizer,
        total_steps=config.steps * config.game.discriminator_updates_per_step,
        seed=config.seed,
        execution=execution,
    )
    session.watch(policy, rollout, discriminator)
    for engine in (policy, discriminator):
        assert engine.optimizer is not None
        check_adam(capabilities, inner_optimizers(engine.optimizer))
    form = origin.batch_format(shape, renderer, world=world, execution=execution)
    players = Players(
        policy,
        discriminator,
        rollout,
        _queue(config, rollout, prompts, world),
        build_handover(config.rollout, policy, rollout, examples=prompts.steps.batch(0), form=form),
        rewarder,
    )
    if rewarder is not None:
        prompts = replace(prompts, exam=_exam(config, held_out, rollout, partial(reward, rewarder, renderer), world))
    files = model_files(source, "policy", dtype=dtype)
    exports = Exports(
        {"policy": files, "discriminator": origin.files(files, dtype)},
        title=f"Alignment of {title_of(config.model)} against its discriminator",
        trained="aligned policy",
        renderer=renderer,
    )
    return Alignment(players, _plan(config, form, dtype), prompts, exports, session)


def _taught(
    config: AlignConfig,
    source: Path,
    shape: Qwen3VLShape,
    renderer: Renderer,
    prompts: Prompts,
    *,
    session: Session,
    dtype: torch.dtype,
    execution: Execution,
) -> Path:
    """The folder of the policy after it was taught the format, on the records that the game is played on."""
    target = session.output / FORMAT_SFT
    teach_format(
        config.data,
        source=source,
        target=target,
        shape=shape,
        renderer=renderer,
        prompts=prompts.steps,
        prompts_per_step=config.rollout.prompts_per_step,
        world=session.world,
        dtype=dtype,
        execution=execution,
        say=session.say,
        activity=session.activity,
    )
    return target


def _prompts(config: AlignConfig, renderer: Renderer, session: Session) -> Prompts:
    """Those of the steps, and others for the probe set that ``--probe-every`` asks for."""
    size, seed = config.rollout.prompts_per_step, config.seed
    checks = checks_of(config.data, look_together(session.world, session.activity))
    build_from = partial(
        build_prompts, config.data, renderer, mini=config.model.mini, batch_size=size, seed=seed, checks=checks
    )
    steps = build_from(scenes="align", selection=None if config.prompts is None else read_selection(config.prompts))
    if not config.game.probe_every:
        return Prompts(steps)
    return Prompts(steps, build_from(scenes="heldout", part="validation"))


def _held_out(config: AlignConfig, renderer: Renderer, session: Session) -> list[Example]:
    """Prompts that ``--eval-prompts`` asks for. Raises DataError where no record is held out that can be checked."""
    checks = checks_of(config.data, look_together(session.world, session.activity))
    try:
        return build_held_out(
            config.exam, config.rewards, config.data, renderer, mini=config.model.mini, seed=config.seed, checks=checks,
            say=session.say,
        )  # fmt: skip
    except NothingLeftError as error:
        raise DataError(
            f"--eval-prompts {config.exam.eval_prompts}: {error}; leave --eval-prompts out, or check answers by a "
            "--reward of your own"
        ) from error


def _exam(
    config: AlignConfig, held_out: Sequence[Example], rollout: RolloutEngine, rewards: RewardGroup, world: World
) -> Exam | None:
    return build_exam(
        config.exam,
        held_out,
        rollout,
        sampling_of(config.rollout, config.data),
        rewards,
        seed=config.seed,
        steps=config.steps,
        save_every=config.checkpoint.save_every,
        world=world,
    )


def _queue(config: AlignConfig, rollout: RolloutEngine, prompts: Prompts, world: World) -> RolloutQueue:
    return RolloutQueue(
        rollout,
        prompts.steps.batch,
        sampling_of(config.rollout, config.data),
        n=config.rollout.rollouts_per_prompt,
        seed=config.seed,
        world=world,
        steps=range(config.steps),
        ahead=config.rollout.rollout_ahead,
    )


def _plan(config: AlignConfig, form: BatchFormat, dtype: torch.dtype) -> AlignPlan:
    """What the loop keeps fixed; ``dtype`` is what the players compute in."""
    return AlignPlan(
        game=config.game,
        judging=JudgePlan(
            form,
            config.tokens_per_microbatch,
            score_regulariser=config.game.score_regulariser,
            seed=config.seed,
            load_balance=config.discriminator.load_balance or 0.0,
            updates_per_step=config.game.discriminator_updates_per_step,
            score_rounding=ROUNDING[dtype],
        ),
        learning=UpdatePlan(
            PolicyObjective(correction=config.correction),
            form,
            config.tokens_per_microbatch,
            config.rollout.temperature,
        ),
        seed=config.seed,
        steps=config.steps,
        logprob_gap_alarm=config.rollout.logprob_gap_alarm,
    )
