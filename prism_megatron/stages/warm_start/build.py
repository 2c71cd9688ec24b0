"""Builds a warm-start's pairs, its discriminator and who samples for it, from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from prism_megatron.config.game import GameConfig
from prism_megatron.config.mini_world import policy_folder
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.config.warm_start import WarmStartConfig
from prism_megatron.conversion.checkpoint_folder import ModelFiles, files_folder
from prism_megatron.data.loader import RecordSource, SceneSource
from prism_megatron.data.pairs import PairCounts, PairSource
from prism_megatron.data.records import Part
from prism_megatron.data.render import Renderer
from prism_megatron.data.scenes import Split
from prism_megatron.engine.capabilities import check_adam, choose, installed
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.optimizer import inner_optimizers
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError, DataError
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.sampling.queue import RolloutQueue
from prism_megatron.sampling.replicas import build_replicas
from prism_megatron.sampling.servers import build_served_rollout
from prism_megatron.sampling.shares import sample_groups
from prism_megatron.stages.align.build import (
    FORMAT_SFT,
    build_discriminator,
    build_format,
    check_discriminator,
    discriminator_files,
)
from prism_megatron.stages.warm_start.stage import StepPairs, WarmStartPlan
from prism_megatron.training.format_sft import teach_format
from prism_megatron.training.roles import model_files, resolve_dtype, weights_in_layout

Source = PairSource | RecordSource | SceneSource


@dataclass(frozen=True, eq=False)
class Sources:
    """What is trained on, for how many steps, and what is held out (None where a set is too small for that)."""

    renderer: Renderer
    train: Source
    held_out: Source | None
    steps: int

    @property
    def train_text(self) -> str:
        """What is trained on, and how much was left out, in words."""
        if isinstance(self.train, SceneSource):
            return "scenes"
        counts = self.train.counts
        if isinstance(counts, PairCounts):
            return (
                f"{counts.pairs} pairs in {counts.lines} lines (too long: {counts.long_prompts} prompts, "
                f"{counts.long_responses} responses)"
            )
        return (
            f"{counts.kept} records, {counts.without_reasoning} of them without reasoning (left out: "
            f"{counts.without_reference} without a caption, {counts.long_prompt} prompts and {counts.long_response} "
            "references that are too long)"
        )


@dataclass(frozen=True, eq=False)
class WarmStartRun:
    """Everything the loop needs. ``rollout`` samples from the fixed policy; None where pairs are read from a file."""

    discriminator: MegatronEngine
    files: ModelFiles
    plan: WarmStartPlan
    rollout: RolloutEngine | None
    sampling: Sampling


def build_sources(config: WarmStartConfig) -> Sources:
    """Check and measure everything that will be trained on.

    Raises DataError for malformed input, for no usable input, and for none to hold out where a gate asks for it;
    ConfigError for a gate on an AUC that these records can have none of.
    """
    folder = files_folder(policy_folder(config.model.model), "policy")
    data = config.data
    renderer = Renderer.from_folder(folder, system_prompt=data.system_prompt, strict_format=data.strict_format)
    train = _source(config, renderer, "train")
    if config.gate.min_auc > 0 and isinstance(train, RecordSource):
        counts = train.counts
        if counts.without_reasoning == counts.kept:
            raise ConfigError(
                f"--min-auc {config.gate.min_auc:g} needs answers that are known to be right or wrong, and nobody "
                "knows that of captions, which are all these records have: leave it out, or ask for --min-accuracy"
            )
    held_out: Source | None = None
    try:
        held_out = _source(config, renderer, "validation")
    except DataError:
        if config.gate.min_auc > 0 or config.gate.min_accuracy > 0:
            raise
    if config.steps is not None:
        steps = config.steps
    else:
        assert not isinstance(train, SceneSource), "scenes have no end"
        count = train.counts.lines if isinstance(train, PairSource) else train.counts.kept
        steps = max(1, count // config.rollout.prompts_per_step)
    return Sources(renderer, train, held_out, steps)


def _source(config: WarmStartConfig, renderer: Renderer, part: Part) -> Source:
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
        )
    if data.data is not None:
        return RecordSource(
            data.data,
            renderer,
            part=part,
            seed=config.seed,
            batch_size=batch_size,
            max_prompt_tokens=data.max_prompt_tokens,
            max_response_tokens=data.max_response_tokens,
        )
    split: Split = "sft" if part == "train" else "heldout"
    return SceneSource(renderer, split=split, seed=config.seed, batch_size=batch_size)


def build_warm_start(
    config: WarmStartConfig, sources: Sources, world: World, *, say: Callable[[str], None]
) -> WarmStartRun:
    """The discriminator, and the policy that answers, taught the format first where it is asked to.

    Raises ConfigError, DataError or ConversionError before anything is trained.
    """
    policy = policy_folder(config.model.model)
    files = files_folder(policy, "policy")
    shape = Qwen3VLShape.from_folder(files)
    dtype = resolve_dtype(config.model.dtype, shape)
    capabilities = choose(installed(), config.precision)
    for line in capabilities.lines():
        say(line)
    align = config.as_align(steps=sources.steps)
    check_discriminator(align, files)
    output = config.checkpoint.output
    if config.data.format_sft and output is not None:
        taught = output / FORMAT_SFT
        if not taught.is_dir():
            assert isinstance(sources.train, RecordSource), "the checks let --format-sft pass with records only"
            teach_format(align, source=policy, target=taught, shape=shape, renderer=sources.renderer,
                         prompts=sources.train, world=world, dtype=dtype, layers=capabilities.layers,
                         say=say)  # fmt: skip
        policy = taught
    discriminator = build_discriminator(align, policy, shape, world=world, dtype=dtype, layers=capabilities.layers)
    assert discriminator.optimizer is not None
    check_adam(capabilities, inner_optimizers(discriminator.optimizer))
    return WarmStartRun(
        discriminator=discriminator,
        files=discriminator_files(align, model_files(policy, "policy", dtype=dtype), dtype),
        plan=WarmStartPlan(
            game=GameConfig(score_regulariser=config.score_regulariser),
            form=build_format(align, shape, sources.renderer, world=world, layers=capabilities.layers),
            tokens_per_microbatch=config.tokens_per_microbatch,
            load_balance=config.load_balance(discriminator.config.num_layers),
            seed=config.seed,
        ),
        rollout=None
        if config.pairs.pairs is not None
        else _sampler(config, policy, shape, sources, world=world, dtype=dtype),
        sampling=Sampling(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            max_new_tokens=config.data.max_response_tokens,
        ),
    )


def _sampler(
    config: WarmStartConfig, policy: Path, shape: Qwen3VLShape, sources: Sources, *, world: World, dtype: torch.dtype
) -> RolloutEngine:
    """A rollout engine with the policy's weights, which stay as they are: version 0."""
    align = config.as_align(steps=sources.steps)
    rollout: RolloutEngine
    if config.rollout.rollout == "sglang":
        rollout = build_served_rollout(align, policy, shape, sources.renderer, world=world, dtype=dtype)
    else:
        folder = files_folder(policy, "policy")
        rollout = build_replicas(align, folder, shape, sources.renderer, world=world, dtype=dtype)
    rollout.update_weights(weights_in_layout(policy, shape, rollout.expert_layout), version=0)
    return rollout


@contextmanager
def step_pairs(
    config: WarmStartConfig, sources: Sources, run: WarmStartRun, *, world: World, steps: range
) -> Iterator[Callable[[int], StepPairs]]:
    """The pairs of each step: lines of the file, or references beside fresh samples."""
    train = sources.train
    if isinstance(train, PairSource):
        yield lambda step: StepPairs((), train.batch(step))
        return
    rollout = run.rollout
    assert rollout is not None
    queue = RolloutQueue(rollout, train.batch, run.sampling, n=config.rollout.rollouts_per_prompt,
                         seed=config.seed, world=world, steps=steps, ahead=config.rollout.rollout_ahead)  # fmt: skip

    with closing(queue):
        yield partial(_taken, rollout, queue)


def _taken(rollout: RolloutEngine, queue: RolloutQueue, step: int) -> StepPairs:
    """Colocated servers hold memory only while they sample: the discriminator trains next."""
    rollout.wake()
    sampled = queue.take(step)
    rollout.sleep()
    return StepPairs(sampled.examples, sampled.groups)


def held_out_pairs(config: WarmStartConfig, held_out: Source, run: WarmStartRun, *, world: World) -> StepPairs:
    """As many held-out prompts as the gate asks for, or as there are; sampled with a seed of their own."""
    count = config.gate.gate_prompts
    if isinstance(held_out, PairSource):
        return StepPairs((), [held_out.group(i) for i in range(min(count, held_out.counts.lines))])
    if isinstance(held_out, RecordSource):
        count = min(count, held_out.counts.kept)
    examples = [held_out.example(i) for i in range(count)]
    assert run.rollout is not None
    run.rollout.wake()
    groups = sample_groups(run.rollout, examples, run.sampling, n=config.gate.gate_rollouts, seed=config.seed + 1,
                           step=0, world=world)  # fmt: skip
    run.rollout.sleep()
    return StepPairs(examples, groups)
