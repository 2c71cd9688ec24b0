"""Builds a warm-start from its configuration: what it trains on, its discriminator and who samples for it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.stages.warm_start import WarmStartConfig
from prism_megatron.config.validate import towers_layout
from prism_megatron.conversion.checkpoints.folder import files_folder
from prism_megatron.conversion.checkpoints.model_names import policy_folder
from prism_megatron.data.admission import Checks, Look, look_alone
from prism_megatron.data.loader import RecordSource, SceneSource
from prism_megatron.data.pairs import PairSource
from prism_megatron.data.reading.intake import NothingLeftError
from prism_megatron.data.records import Part
from prism_megatron.data.render import Renderer
from prism_megatron.data.scene_set import SceneSet
from prism_megatron.data.selection import read_selection
from prism_megatron.engine.host.capabilities import check_adam
from prism_megatron.engine.host.execution import execution_here
from prism_megatron.engine.optimizer import inner_optimizers
from prism_megatron.engine.runtime import World, with_experts
from prism_megatron.errors import ConfigError
from prism_megatron.game.discriminator import DiscriminatorOrigin
from prism_megatron.game.judge import JudgePlan
from prism_megatron.parallel.collectives import broadcast_object
from prism_megatron.run.driver import drive
from prism_megatron.run.session import Session
from prism_megatron.sampling.build import build_rollout, sampling_of
from prism_megatron.sampling.queue import RolloutQueue
from prism_megatron.stages.warm_start.gate import Gate
from prism_megatron.stages.warm_start.pairs import FilePairs, Pairs, SampledPairs, Source, Sources
from prism_megatron.stages.warm_start.stage import WarmStart
from prism_megatron.training.format_sft import FORMAT_SFT, teach_format
from prism_megatron.training.prompts import build_prompts, checks_of, look_together, renderer_of, say_counts
from prism_megatron.training.roles import model_files, resolve_dtype, weights_in_layout


def warm_up_on(world: World, config: WarmStartConfig) -> None:
    """A whole run on a world that is there. Raises PrismError at its very end where the gate is not passed."""
    drive(world, config, build, kind=WarmStart.name)


def build(config: WarmStartConfig, session: Session) -> WarmStart:
    """The discriminator, and the policy that answers, taught the format first where it is asked to.

    Raises ConfigError, DataError or ConversionError before anything is trained.
    """
    sources = build_sources(config, look_together(session.world, session.activity))
    held_out = sources.held_out
    say_counts(sources.train.counts, None if held_out is None else held_out.counts, session.say)
    if held_out is None:
        session.say("nothing is held out: the discriminator will not be measured at the end")
    session.say(f"run folder {session.output}; {sources.steps} steps on {sources.train_text}")
    text = f"building the discriminator on {session.world.world_size} ranks ({session.layout_text})"
    with session.phase("build", text):
        return _build(config, sources, session)


def build_sources(config: WarmStartConfig, look: Look = look_alone) -> Sources:
    """Check and measure everything that will be trained on, with images seen by ``look``.

    Raises DataError for malformed input, for no usable input, and for none to hold out where a gate asks for it;
    ConfigError for a gate on an AUC that these records can have none of.
    """
    folder = files_folder(policy_folder(config.model.model, mini=config.model.mini), "policy")
    data = config.data
    renderer = renderer_of(folder, data)
    checks = checks_of(data, look)
    train = _source(config, renderer, "train", checks)
    if config.gate.min_auc > 0 and isinstance(train, RecordSource):
        counts = train.counts
        if counts.also["without_reasoning"] == counts.kept:
            raise ConfigError(
                f"--min-auc {config.gate.min_auc:g} needs answers that are known to be right or wrong, and nobody "
                "knows that of captions, which are all these records have: leave it out, or ask for --min-accuracy"
            )
    held_out: Source | None = None
    try:
        held_out = _source(config, renderer, "validation", checks)
    except NothingLeftError:
        if config.gate.min_auc > 0 or config.gate.min_accuracy > 0:
            raise
    if config.steps is not None:
        steps = config.steps
    else:
        assert not isinstance(train, SceneSource | SceneSet), "scenes have no end"
        steps = max(1, train.counts.kept // config.rollout.prompts_per_step)
    return Sources(renderer, train, held_out, steps)


def _source(config: WarmStartConfig, renderer: Renderer, part: Part, checks: Checks) -> Source:
    batch_size, data = config.rollout.prompts_per_step, config.data
    if config.pairs.pairs is not None:
        return PairSource(
            config.pairs.pairs,
            renderer,
            part=part,
            seed=config.seed,
            batch_size=batch_size,
            max_prompt_tokens=data.max_prompt_tokens,
            max_response_tokens=data.max_response_tokens,
            checks=checks,
        )
    build_part = partial(
        build_prompts, data, renderer, mini=config.model.mini, part=part, batch_size=batch_size, seed=config.seed,
        checks=checks,
    )  # fmt: skip
    if part == "validation":
        return build_part(scenes="heldout")
    if config.prompts is None:
        return build_part(scenes="sft")
    return build_part(scenes="align", selection=read_selection(config.prompts))


def _build(config: WarmStartConfig, sources: Sources, session: Session) -> WarmStart:
    world = session.world
    # What is checked without a weight.
    # The mini's shipped discriminator has had its warm-start: here one is always made anew.
    model, scenes = config.model, config.data.data is None and config.pairs.pairs is None
    origin = DiscriminatorOrigin.of(config.discriminator, of_the_mini=False, mini=model.mini, scenes=scenes)
    # What a run's folder stands for may change between two ranks' looks at it.
    policy, origin = broadcast_object((policy_folder(model.model, mini=model.mini), origin), source=0)
    files = files_folder(policy, "policy")
    shape = Qwen3VLShape.from_folder(files)
    dtype = resolve_dtype(config.model.dtype, shape)
    execution, capabilities = execution_here(
        config.recompute, config.precision, config.speed, world=world, dtype=dtype, say=session.say
    )
    origin.check(files)
    if session.restored is not None:
        origin.check_checkpoint(session.restored)
    # The policy that answers.
    if config.data.format_sft:
        taught = session.output / FORMAT_SFT
        if not taught.is_dir():
            assert isinstance(sources.train, RecordSource), "the checks let --format-sft pass with records only"
            teach_format(
                config.data,
                source=policy,
                target=taught,
                shape=shape,
                renderer=sources.renderer,
                prompts=sources.train,
                prompts_per_step=config.rollout.prompts_per_step,
                world=world,
                dtype=dtype,
                execution=execution,
                say=session.say,
                activity=session.activity,
            )
        policy = taught
    # The discriminator.
    discriminator = origin.build(
        policy,
        shape,
        world=with_experts(world, towers_layout(config, shape) or world.parallel),
        dtype=dtype,
        optimizer=config.discriminator_optimizer,
        total_steps=sources.steps,
        seed=config.seed,
        execution=execution,
    )
    session.watch(discriminator)
    assert discriminator.optimizer is not None
    check_adam(capabilities, inner_optimizers(discriminator.optimizer))
    plan = JudgePlan(
        origin.batch_format(shape, sources.renderer, world=world, execution=execution),
        config.tokens_per_microbatch,
        score_regulariser=config.score_regulariser,
        seed=config.seed,
        load_balance=config.load_balance(discriminator.config.num_layers),
    )
    return WarmStart(
        discriminator,
        plan,
        _pairs(config, policy, shape, sources, session, dtype=dtype),
        Gate(config.gate.min_auc, config.gate.min_accuracy, config.gate.gate_prompts),
        session,
        renderer=sources.renderer,
        models={"discriminator": origin.files(model_files(policy, "policy", dtype=dtype), dtype)},
        total_steps=sources.steps,
        identity=sources.train.identity,
        data_counts={} if sources.train.counts is None else sources.train.counts.to_plain(),
        write_pairs=config.pairs.write_pairs,
    )


def _pairs(
    config: WarmStartConfig,
    policy: Path,
    shape: Qwen3VLShape,
    sources: Sources,
    session: Session,
    *,
    dtype: torch.dtype,
) -> Pairs:
    """Lines of the file, or samples of the policy, which stays version 0."""
    train, apart = sources.train, sources.held_out
    if isinstance(train, PairSource):
        assert apart is None or isinstance(apart, PairSource)
        return FilePairs(train, apart)
    assert not isinstance(apart, PairSource)
    sampling = sampling_of(config.rollout, config.data)
    rollout = build_rollout(
        config.rollout, config.data, policy, shape, sources.renderer, output=session.output, world=session.world,
        dtype=dtype,
    )  # fmt: skip
    session.watch(rollout)
    queue = RolloutQueue(
        rollout,
        train.batch,
        sampling,
        n=config.rollout.rollouts_per_prompt,
        seed=config.seed,
        world=session.world,
        steps=range(sources.steps),
        ahead=config.rollout.rollout_ahead,
    )
    return SampledPairs(
        rollout,
        queue,
        apart,
        sampling,
        hand_over=lambda: rollout.update_weights(weights_in_layout(policy, shape, rollout.expert_layout), version=0),
        rollouts_apart=config.gate.gate_rollouts,
        seed=config.seed + 1,
        world=session.world,
    )
