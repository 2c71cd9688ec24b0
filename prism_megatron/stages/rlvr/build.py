"""Builds reinforcement learning from verifiable rewards from its configuration, which is taken apart here."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from prism_megatron.config.architecture.model import ALL_VISION
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.stages.objective import recommended_correction
from prism_megatron.config.stages.rlvr import RLVRConfig
from prism_megatron.conversion.checkpoints.folder import files_folder
from prism_megatron.conversion.checkpoints.model_names import policy_folder, title_of
from prism_megatron.data.loader import Example, RecordSource, SceneSource
from prism_megatron.data.reading.intake import NothingLeftError
from prism_megatron.data.render import Renderer
from prism_megatron.data.scene_set import SceneSet
from prism_megatron.data.selection import Selection, read_selection
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.host.capabilities import check_adam
from prism_megatron.engine.host.execution import Execution, execution_here
from prism_megatron.engine.optimizer import inner_optimizers
from prism_megatron.engine.runtime import World
from prism_megatron.parallel.collectives import broadcast_object
from prism_megatron.rewards.rewarder import Rewarder
from prism_megatron.rollout.base import RolloutEngine
from prism_megatron.run.driver import drive
from prism_megatron.run.exports import Exports
from prism_megatron.run.session import Session
from prism_megatron.sampling.build import build_exam, build_handover, build_rollout, sampling_of
from prism_megatron.sampling.queue import RolloutQueue
from prism_megatron.sampling.rewarding import reward
from prism_megatron.sampling.shares import RewardGroup
from prism_megatron.stages.rlvr.credit import Crediting
from prism_megatron.stages.rlvr.plan import Learner, Prompts, RLVRPlan
from prism_megatron.stages.rlvr.prospect import Prospector
from prism_megatron.stages.rlvr.stage import RLVR
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
from prism_megatron.training.roles import batch_format, build_policy, model_files, resolve_dtype


def reinforce_on(world: World, config: RLVRConfig) -> None:
    """A whole run on a world that is there."""
    drive(world, config, build, kind=RLVR.name)


def build(config: RLVRConfig, session: Session) -> RLVR:
    """The policy with loaded weights, who samples for it, and who checks what it says.

    Raises ConfigError, DataError, RewardError or ConversionError before anything is trained.
    """
    world = session.world
    text = f"building the policy on {world.world_size} ranks ({session.layout_text}); run folder {session.output}"
    with session.phase("build", text):
        return _build(config, session)


def _build(config: RLVRConfig, session: Session) -> RLVR:
    world = session.world
    # What a run's folder stands for may change between two ranks' looks at it.
    source = policy_folder(config.model.model, of_the_mini="aligned", mini=config.model.mini)
    source = broadcast_object(source, source=0)
    folder = files_folder(source, "policy")
    shape = Qwen3VLShape.from_folder(folder)
    dtype = resolve_dtype(config.model.dtype, shape)
    execution, capabilities = execution_here(
        config.recompute, config.precision, config.speed, world=world, dtype=dtype, say=session.say
    )
    if (advice := recommended_correction(config.objective.correction, config.rollout)) is not None:
        session.say(advice)
    # What is asked, and how answers are checked.
    renderer = renderer_of(folder, config.data)
    selection = None if config.prompts is None else read_selection(config.prompts)
    prompts, held_out = _prompts(config, renderer, session, selection)
    rewarder = Rewarder(config.rewards, strict_format=config.data.strict_format, say=session.say)
    rewards = partial(reward, rewarder, renderer)
    # The policy, and who samples for it.
    if config.data.format_sft and (taught := _taught_before(session)) is not None:
        source = taught
    elif config.data.format_sft:
        source = _taught(
            config, source, shape, renderer, session, selection=selection, dtype=dtype, execution=execution
        )
    policy = _policy(config, source, shape, world=world, dtype=dtype, execution=execution)
    reference = None
    if config.objective.kl != "none":
        reference = _policy(config, source, shape, world=world, dtype=dtype, execution=execution, trains=False)
    rollout = build_rollout(
        config.rollout, config.data, source, shape, renderer, output=session.output, world=world, dtype=dtype
    )
    session.watch(*(engine for engine in (policy, reference, rollout) if engine is not None))
    assert policy.optimizer is not None
    check_adam(capabilities, inner_optimizers(policy.optimizer))
    form = batch_format(renderer, world, execution, share_prompts=True)
    prospector = _prospector(config, rollout, prompts, rewards, world)
    handover = build_handover(config.rollout, policy, rollout, examples=prompts.batch(0), form=form)
    learner = Learner(policy, reference, rollout, prospector, rewarder, handover)
    exam = build_exam(
        config.exam, held_out, rollout, sampling_of(config.rollout, config.data), rewards, seed=config.seed,
        steps=config.steps, save_every=config.checkpoint.save_every, world=world,
    )  # fmt: skip
    exports = Exports(
        {"policy": model_files(source, "policy", dtype=dtype)},
        title=f"Verifiable rewards for {title_of(config.model)} ({config.algo})",
        trained="reinforced policy",
        renderer=renderer,
    )
    return RLVR(
        learner,
        _plan(config, form),
        Prompts(prompts, exam),
        exports,
        session,
    )


def _prompts(
    config: RLVRConfig, renderer: Renderer, session: Session, selection: Selection | None
) -> tuple[SceneSource | SceneSet | RecordSource, list[Example]]:
    """Those of the steps, of the ``selection`` if there is one, and those that no step asks."""
    data, mini, seed, say = config.data, config.model.mini, config.seed, session.say
    checks = checks_of(data, look_together(session.world, session.activity))
    size = config.dynamic.batch_size(config.rollout)
    steps = build_prompts(
        data, renderer, scenes="align", mini=mini, batch_size=size, seed=seed, checks=checks, answers_alone=True,
        selection=selection,
    )  # fmt: skip
    say_counts(steps.counts, None, say)
    try:
        held_out = build_held_out(
            config.exam, config.rewards, data, renderer, mini=mini, seed=seed, checks=checks, say=say
        )
    except NothingLeftError as error:
        say(f"nothing is held out: {error}")
        held_out = []
    return steps, held_out


def _taught_before(session: Session) -> Path | None:
    """The policy that a run which goes on had taught the format: what it is held near to has not moved since.

    None for a run that begins, and where the folder is gone, so that it has to be made again.
    """
    if session.restored is None:
        return None
    places = [session.output / FORMAT_SFT, session.restored.parents[1] / FORMAT_SFT]
    return broadcast_object(next((place for place in places if place.is_dir()), None), source=0)


def _taught(
    config: RLVRConfig,
    source: Path,
    shape: Qwen3VLShape,
    renderer: Renderer,
    session: Session,
    *,
    selection: Selection | None,
    dtype: torch.dtype,
    execution: Execution,
) -> Path:
    """The folder of the policy after it was taught the format, on the records that show it."""
    checks = checks_of(config.data, look_together(session.world, session.activity))
    size = config.rollout.prompts_per_step
    shown = build_prompts(
        config.data, renderer, scenes="sft", mini=config.model.mini, batch_size=size, seed=config.seed, checks=checks,
        selection=selection,
    )  # fmt: skip
    assert isinstance(shown, RecordSource), "the checks let --format-sft pass with records only"
    teach_format(
        config.data,
        source=source,
        target=session.output / FORMAT_SFT,
        shape=shape,
        renderer=renderer,
        prompts=shown,
        prompts_per_step=size,
        world=session.world,
        dtype=dtype,
        execution=execution,
        say=session.say,
        activity=session.activity,
    )
    return session.output / FORMAT_SFT


def _policy(
    config: RLVRConfig,
    source: Path,
    shape: Qwen3VLShape,
    *,
    world: World,
    dtype: torch.dtype,
    execution: Execution,
    trains: bool = True,
) -> MegatronEngine:
    return build_policy(
        source,
        shape,
        world=world,
        dtype=dtype,
        optimizer=config.policy if trains else None,
        total_steps=config.steps * config.objective.updates,
        freeze=ALL_VISION if config.model.freeze_policy_vision else (),
        execution=execution,
    )


def _prospector(
    config: RLVRConfig,
    rollout: RolloutEngine,
    prompts: SceneSource | SceneSet | RecordSource,
    rewards: RewardGroup,
    world: World,
) -> Prospector:
    selective = config.dynamic.dynamic_sampling
    batches = config.dynamic.max_batches if selective else 1
    queue = RolloutQueue(
        rollout,
        prompts.batch,
        sampling_of(config.rollout, config.data),
        n=config.rollout.rollouts_per_prompt,
        seed=config.seed,
        world=world,
        steps=range(config.steps * batches),
        ahead=config.rollout.rollout_ahead,
        reward=rewards,
    )
    return Prospector(queue, config.rollout.prompts_per_step, batches, selective)


def _plan(config: RLVRConfig, form: BatchFormat) -> RLVRPlan:
    """What the loop keeps fixed."""
    longest = config.data.max_response_tokens
    return RLVRPlan(
        Crediting(config.advantage, longest, config.overlong_buffer, config.overlong_factor),
        UpdatePlan(config.objective, form, config.tokens_per_microbatch, config.rollout.temperature),
        steps=config.steps,
        prompts_per_step=config.rollout.prompts_per_step,
        rollouts_per_prompt=config.rollout.rollouts_per_prompt,
        logprob_gap_alarm=config.rollout.logprob_gap_alarm,
    )
