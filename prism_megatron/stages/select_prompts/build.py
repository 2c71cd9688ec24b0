"""Builds a selection of prompts from its configuration, and makes it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.stages.select_prompts import SelectPromptsConfig
from prism_megatron.conversion.checkpoints.folder import files_folder
from prism_megatron.conversion.checkpoints.model_names import policy_folder
from prism_megatron.data.loader import RecordSource
from prism_megatron.data.records import Record
from prism_megatron.data.render import Renderer
from prism_megatron.data.scene_set import SceneSet
from prism_megatron.data.scenes import Scene, make_scene
from prism_megatron.engine.runtime import World
from prism_megatron.errors import PrismError
from prism_megatron.parallel.collectives import broadcast_object, on_main
from prism_megatron.rewards.rewarder import Rewarder
from prism_megatron.run.result_folder import result_folder, session_in
from prism_megatron.run.session import Session
from prism_megatron.sampling.build import build_rollout, sampling_of
from prism_megatron.sampling.queue import RolloutQueue
from prism_megatron.sampling.rewarding import reward
from prism_megatron.stages.select_prompts.ask import Batches, ask_all
from prism_megatron.stages.select_prompts.choice import SELECTED, Keep, summary_of, table_of, write_choice
from prism_megatron.stages.select_prompts.identity import check_same_asked, settle
from prism_megatron.stages.select_prompts.pass_rates import PASS_RATES, PassRate, PassRateFile
from prism_megatron.training.prompts import build_prompts, checks_of, look_together, renderer_of, say_counts
from prism_megatron.training.roles import resolve_dtype, weights_in_layout


def select_on(world: World, config: SelectPromptsConfig) -> None:
    """A whole selection on a world that is there.

    Raises PrismError for bad input before anything is asked, and at its very end where no prompt is kept; RunStopped as
    ``ask_all``.
    """
    check = partial(check_same_asked, config)
    with (
        result_folder(world, config.output, kind="select-prompts", check=check) as folder,
        session_in(world, folder) as session,
    ):
        _select(config, session)


def _select(config: SelectPromptsConfig, session: Session) -> None:
    # What is asked of whom.
    policy = broadcast_object(policy_folder(config.model, of_the_mini="aligned", mini=config.mini), source=0)
    renderer = renderer_of(files_folder(policy, "policy"), config.data)
    prompts = _prompts(config, renderer, session)
    on_main(partial(settle, session.output, config, policy=policy, data=prompts.identity))
    session.open()
    counts = prompts.counts
    say_counts(counts, None, session.say)
    # How often each is answered right.
    keep = Keep(config.keep_from, config.keep_to)
    size = config.rollout.prompts_per_step
    file = PassRateFile(session.output / PASS_RATES, [one.id for one in asked_of(prompts)], size)
    rates = on_main(file.reopen)
    session.say(f"folder {session.output}; {len(rates)} of {len(file.ids)} prompts have been answered")
    if len(rates) < len(file.ids):
        rates += _asked(config, policy, prompts, session, renderer=renderer, file=file, done=len(rates))
    # Which of them are kept.
    summary = summary_of(rates, config.rollout.rollouts_per_prompt, keep, {} if counts is None else counts.to_plain())
    on_main(partial(write_choice, session.output, rates, asked_of(prompts), keep, summary))
    for line in table_of(summary):
        session.show_text(line)
    if not summary["selected"]:
        raise PrismError(
            f"no prompt has a pass rate from {keep.low:g} to {keep.high:g}; the same command with another "
            f"--keep-from and --keep-to and --output {session.output} chooses again, and asks nothing"
        )
    session.say(f"wrote {session.output / SELECTED}, which prism-rlvr --prompts reads")


def asked_of(prompts: RecordSource | SceneSet) -> Sequence[Record | Scene]:
    """What is asked about, in the order in which it is."""
    return prompts.scenes if isinstance(prompts, SceneSet) else prompts.records


def _prompts(config: SelectPromptsConfig, renderer: Renderer, session: Session) -> RecordSource | SceneSet:
    """The records, or the first of the scenes, that ``prism-rlvr`` would train on."""
    if config.data.data is None:
        scenes = [make_scene("align", seed=config.seed, index=i, world=config.mini) for i in range(config.scenes)]
        return SceneSet(scenes, renderer, seed=config.seed, batch_size=config.rollout.prompts_per_step)
    prompts = build_prompts(
        config.data,
        renderer,
        scenes="align",
        mini=config.mini,
        batch_size=config.rollout.prompts_per_step,
        seed=config.seed,
        checks=checks_of(config.data, look_together(session.world, session.activity)),
        answers_alone=True,
    )
    assert isinstance(prompts, RecordSource), "the checks ask for --data"
    return prompts


def _asked(
    config: SelectPromptsConfig,
    policy: Path,
    prompts: RecordSource | SceneSet,
    session: Session,
    *,
    renderer: Renderer,
    file: PassRateFile,
    done: int,
) -> list[PassRate]:
    """The pass rates of all prompts but the first ``done``."""
    world, shape = session.world, Qwen3VLShape.from_folder(files_folder(policy, "policy"))
    dtype = resolve_dtype(config.dtype, shape)
    batches = Batches(prompts.in_order, len(file.ids), file.batch_size)
    with Rewarder(config.rewards, strict_format=config.data.strict_format, say=session.say) as rewarder:
        with session.phase("build", f"making the rollout engine ready on {world.world_size} ranks"):
            rollout = build_rollout(
                config.rollout, config.data, policy, shape, renderer, output=session.output, world=world, dtype=dtype
            )
        session.watch(rollout)
        with closing(rollout):
            with session.phase("weight_sync"):
                rollout.update_weights(weights_in_layout(policy, shape, rollout.expert_layout), version=0)
            queue = RolloutQueue(
                rollout,
                batches.batch,
                sampling_of(config.rollout, config.data),
                n=config.rollout.rollouts_per_prompt,
                seed=config.seed,
                world=world,
                steps=range(batches.count),
                ahead=config.rollout.rollout_ahead,
                reward=partial(reward, rewarder, renderer),
            )
            with closing(queue):
                return ask_all(batches, queue, file, session, done=done)
