"""Builds an alignment run's players, prompts and plan from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.towers import Towers
from model_providers.moe_discriminator.upcycle import UpcycledSource
from prism_megatron.config.align import AlignConfig
from prism_megatron.config.mini_world import MINI_FOLDER, policy_folder
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.conversion.hf_reader import HFFolder
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.data.loader import ExampleSource, RecordSource, SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.engine.capabilities import check_adam, choose, installed
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.optimizer import inner_optimizers
from prism_megatron.engine.runtime import World
from prism_megatron.errors import ConfigError
from prism_megatron.rollout.base import Sampling
from prism_megatron.stages.align import AlignPlan, Players
from prism_megatron.stages.assembly import batch_format, build_policy, build_rollout, resolve_dtype
from prism_megatron.stages.format_sft import teach_format

FORMAT_SFT = "format_sft"
"""Folder, inside the run's, of the policy after ``--format-sft``."""


@dataclass(frozen=True, eq=False)
class AlignRun:
    """Everything the loop needs. The rollout engine has no weights yet."""

    folder: Path
    shape: Qwen3VLShape
    renderer: Renderer
    prompts: ExampleSource
    players: Players
    plan: AlignPlan


def build_run(config: AlignConfig, world: World, *, fresh: bool, say: Callable[[str], None]) -> AlignRun:
    """Load both players; a ``fresh`` run (one without a checkpoint) teaches the format first where it is asked to.

    Raises ConfigError, DataError or ConversionError before anything is trained.
    """
    folder = policy_folder(config.model.model)
    shape = Qwen3VLShape.from_folder(folder)
    dtype = resolve_dtype(config.model.dtype, shape)
    capabilities = choose(installed(), config.precision)
    for line in capabilities.lines():
        say(line)
    renderer = Renderer.from_folder(folder, system_prompt=config.data.system_prompt)
    prompts = build_prompts(config, renderer)
    output = config.checkpoint.output
    if config.data.format_sft and fresh and output is not None:
        teach_format(
            config,
            source=folder,
            target=output / FORMAT_SFT,
            shape=shape,
            renderer=renderer,
            prompts=prompts,
            world=world,
            dtype=dtype,
            layers=capabilities.layers,
            say=say,
        )
        folder = output / FORMAT_SFT
    policy = build_policy(
        folder,
        shape,
        world=world,
        dtype=dtype,
        optimizer=config.policy,
        total_steps=config.steps,
        recompute=config.recompute,
        precision=config.precision,
        layers=capabilities.layers,
    )
    rollout = build_rollout(folder, renderer, world=world, dtype=dtype)
    discriminator = build_discriminator(config, folder, shape, world=world, dtype=dtype, layers=capabilities.layers)
    for engine in (policy, discriminator):
        assert engine.optimizer is not None
        check_adam(capabilities, inner_optimizers(engine.optimizer))
    plan = AlignPlan(
        game=config.game,
        sampling=Sampling(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            max_new_tokens=config.data.max_response_tokens,
        ),
        rollouts_per_prompt=config.rollout.rollouts_per_prompt,
        prompts_per_microbatch=config.prompts_per_microbatch,
        load_balance=config.discriminator.load_balance,
        vocab_size=shape.text.vocab,
        seed=config.seed,
        form=batch_format(shape, renderer, world, config.precision),
    )
    return AlignRun(folder, shape, renderer, prompts, Players(policy, discriminator, rollout), plan)


def build_prompts(config: AlignConfig, renderer: Renderer) -> ExampleSource:
    """Records of ``--data``, or scenes of the mini world."""
    if config.data.data is None:
        return SceneSource(renderer, split="align", seed=config.seed, batch_size=config.rollout.prompts_per_step)
    return RecordSource(
        config.data.data,
        renderer,
        part="train",
        seed=config.seed,
        batch_size=config.rollout.prompts_per_step,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.data.max_response_tokens,
    )


def build_discriminator(
    config: AlignConfig,
    policy: Path,
    shape: Qwen3VLShape,
    *,
    world: World,
    dtype: torch.dtype,
    layers: Literal["te", "torch"] = "torch",
) -> MegatronEngine:
    """A saved discriminator (the mini's own where the mini's policy plays), or one upcycled from the policy."""
    wanted = config.discriminator
    folder = None if wanted.discriminator is None else Path(wanted.discriminator)
    if folder is None and config.model.model is None:
        folder = MINI_FOLDER / "discriminator"
    towers = Towers(experts_per_tower=wanted.experts_per_tower, top_k=wanted.top_k)
    source: TensorSource
    if folder is None:
        provider = DiscriminatorProvider(
            shape,
            towers,
            head_dropout=wanted.head_dropout,
            freeze_vision=wanted.freeze_vision,
            recompute=config.recompute,
            precision=config.precision,
            layers=layers,
        )
        source = UpcycledSource(
            HFFolder(policy),
            shape,
            towers,
            seed=config.seed,
            expert_std=wanted.upcycle_noise,
            init_std=wanted.router_std,
        )
    else:
        provider = DiscriminatorProvider.from_folder(
            folder,
            head_dropout=wanted.head_dropout,
            freeze_vision=wanted.freeze_vision,
            recompute=config.recompute,
            precision=config.precision,
            layers=layers,
        )
        if provider.towers != towers:
            raise ConfigError(
                f"--experts-per-tower {towers.experts_per_tower} --top-k {towers.top_k}: the discriminator in {folder} "
                f"has {provider.towers.experts_per_tower} and {provider.towers.top_k}; use those"
            )
        source = HFFolder(folder)
    engine = MegatronEngine(
        name="discriminator",
        provider=provider,
        world=world,
        dtype=dtype,
        optimizer=config.discriminator_optimizer,
        total_steps=config.steps,
    )
    engine.load_hf(source)
    return engine
