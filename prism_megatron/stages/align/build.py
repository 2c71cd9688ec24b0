"""Builds an alignment run's players, prompts and plan from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from model_providers.moe_discriminator.folder import check_kind_of, config_text, read_variant
from model_providers.moe_discriminator.mapping import count_parameters
from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.upcycle import UpcycledSource
from model_providers.moe_discriminator.variant import Variant
from prism_megatron.config.align import AlignConfig
from prism_megatron.config.discriminator import DiscriminatorConfig
from prism_megatron.config.mini_world import MINI_FOLDER, policy_folder
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.conversion.checkpoint_folder import ModelFiles, files_folder
from prism_megatron.data.loader import ExampleSource, RecordSource, SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.scenes import Split
from prism_megatron.engine.capabilities import check_adam, choose, installed
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.optimizer import inner_optimizers
from prism_megatron.engine.runtime import World
from prism_megatron.game.same_inputs import check_same_inputs
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.rollout.weight_buckets import GATHERED_SHARE
from prism_megatron.sampling.probe import ServingProbe
from prism_megatron.sampling.replicas import build_replicas
from prism_megatron.sampling.servers import SharedRollout, build_served_rollout
from prism_megatron.stages.align.stage import AlignPlan, Players, trust
from prism_megatron.training.batches import BatchFormat
from prism_megatron.training.format_sft import teach_format
from prism_megatron.training.roles import (
    batch_format,
    build_policy,
    hf_tensors,
    load_weights,
    model_files,
    resolve_dtype,
)

FORMAT_SFT = "format_sft"
"""Folder, inside the run's, of the policy after ``--format-sft``."""


@dataclass(frozen=True, eq=False)
class AlignRun:
    """Everything the loop needs. The rollout engine has no weights yet.

    ``folder`` holds the policy's config and tokenizer; ``models`` is what checkpoints keep of each role.
    """

    folder: Path
    models: Mapping[str, ModelFiles]
    shape: Qwen3VLShape
    renderer: Renderer
    prompts: ExampleSource
    probe_prompts: ExampleSource | None
    """prompts that no step has, for --probe-every"""
    players: Players
    plan: AlignPlan


def build_run(config: AlignConfig, world: World, *, fresh: bool, say: Callable[[str], None]) -> AlignRun:
    """Load both players; a ``fresh`` run (one without a checkpoint) teaches the format first where it is asked to.

    Raises ConfigError, DataError or ConversionError before anything is trained.
    """
    source = policy_folder(config.model.model)
    folder = files_folder(source, "policy")
    shape = Qwen3VLShape.from_folder(folder)
    check_discriminator(config, folder)
    dtype = resolve_dtype(config.model.dtype, shape)
    capabilities = choose(installed(), config.precision)
    for line in capabilities.lines():
        say(line)
    renderer = Renderer.from_folder(
        folder, system_prompt=config.data.system_prompt, strict_format=config.data.strict_format
    )
    prompts = build_prompts(config, renderer)
    output = config.checkpoint.output
    if config.data.format_sft and fresh and output is not None:
        teach_format(
            config,
            source=source,
            target=output / FORMAT_SFT,
            shape=shape,
            renderer=renderer,
            prompts=prompts,
            world=world,
            dtype=dtype,
            layers=capabilities.layers,
            say=say,
        )
        source = folder = output / FORMAT_SFT
    policy = build_policy(
        source,
        shape,
        world=world,
        dtype=dtype,
        optimizer=config.policy,
        total_steps=-(-config.steps // config.game.policy_update_every),
        freeze_vision=config.model.freeze_policy_vision,
        recompute=config.recompute,
        precision=config.precision,
        layers=capabilities.layers,
    )
    rollout: RolloutEngine
    if config.rollout.rollout == "sglang":
        rollout = build_served_rollout(config, source, shape, renderer, world=world, dtype=dtype)
    else:
        rollout = build_replicas(config, folder, shape, renderer, world=world, dtype=dtype)
    say(_size_line(config, shape))
    discriminator = build_discriminator(config, source, shape, world=world, dtype=dtype, layers=capabilities.layers)
    files = model_files(source, "policy", dtype=dtype)
    models = {"policy": files, "discriminator": discriminator_files(config, files, dtype)}
    for engine in (policy, discriminator):
        assert engine.optimizer is not None
        check_adam(capabilities, inner_optimizers(engine.optimizer))
    players = Players(policy, discriminator, rollout)
    form = build_format(config, shape, renderer, world=world, layers=capabilities.layers)
    plan = _plan(config, players, prompts, shape.text.vocab, form, world=world)
    probe_prompts = build_prompts(config, renderer, held_out=True) if config.game.probe_every else None
    return AlignRun(folder, models, shape, renderer, prompts, probe_prompts, players, plan)


def _plan(
    config: AlignConfig, players: Players, prompts: ExampleSource, vocab_size: int, form: BatchFormat, *, world: World
) -> AlignPlan:
    """What the loop keeps fixed; servers' weights are probed where that is asked for."""
    check_served = trust
    if isinstance(players.rollout, SharedRollout) and config.rollout.rollout_probe_every:
        probe = ServingProbe(
            prompts.batch(0),
            every=config.rollout.rollout_probe_every,
            bound=config.rollout.rollout_probe_bound,
            vocab_size=vocab_size,
            form=form,
            world=world,
        )
        check_served = partial(probe.check, players.rollout, players.policy)
    return AlignPlan(
        game=config.game,
        sampling=Sampling(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            max_new_tokens=config.data.max_response_tokens,
        ),
        rollouts_per_prompt=config.rollout.rollouts_per_prompt,
        tokens_per_microbatch=config.tokens_per_microbatch,
        load_balance=config.discriminator.load_balance or 0.0,
        vocab_size=vocab_size,
        seed=config.seed,
        form=form,
        check_served=check_served,
        gather_bytes=config.rollout.rollout_bucket_mib * 2**20 // GATHERED_SHARE,
    )


def build_format(
    config: AlignConfig, shape: Qwen3VLShape, renderer: Renderer, *, world: World, layers: Literal["te", "torch"]
) -> BatchFormat:
    """How both players' rows become tensors."""
    return batch_format(
        renderer,
        world,
        config.precision,
        unseen=unseen_tokens(config.discriminator, shape),
        # Transformer Engine's attention has no shared prefixes, and a z-loss is a mean over whole sequences.
        share_prompts=layers == "torch" and not config.discriminator.router_z_loss,
    )


def build_prompts(config: AlignConfig, renderer: Renderer, *, held_out: bool = False) -> ExampleSource:
    """Records of ``--data``, or scenes of the mini world; ``held_out`` ones are in no batch of the others."""
    if config.data.data is None:
        split: Split = "heldout" if held_out else "align"
        return SceneSource(renderer, split=split, seed=config.seed, batch_size=config.rollout.prompts_per_step)
    return RecordSource(
        config.data.data,
        renderer,
        part="validation" if held_out else "train",
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
    wanted, folder, variant = config.discriminator, discriminator_folder(config), Variant.of(config.discriminator)
    if folder is None:
        provider = DiscriminatorProvider(
            shape,
            variant.towers,
            modality=variant.modality,
            head_dropout=wanted.head_dropout,
            load_balance_scope=wanted.load_balance_scope,
            router_z_loss=wanted.router_z_loss,
            freeze_vision=wanted.freeze_vision,
            recompute=config.recompute,
            precision=config.precision,
            layers=layers,
        )
    else:
        provider = DiscriminatorProvider.from_folder(
            files_folder(folder, "discriminator"),
            head_dropout=wanted.head_dropout,
            load_balance_scope=wanted.load_balance_scope,
            router_z_loss=wanted.router_z_loss,
            freeze_vision=wanted.freeze_vision,
            recompute=config.recompute,
            precision=config.precision,
            layers=layers,
        )
    engine = MegatronEngine(
        name="discriminator",
        provider=provider,
        world=world,
        dtype=dtype,
        optimizer=config.discriminator_optimizer,
        total_steps=config.steps * config.game.discriminator_updates_per_step,
    )
    if folder is not None:
        load_weights(engine, folder)
    else:
        engine.load_hf(
            UpcycledSource(
                hf_tensors(policy, shape),
                shape,
                variant.towers,
                seed=config.seed,
                expert_std=wanted.upcycle_noise,
                init_std=wanted.router_std,
            )
        )
    return engine


def check_discriminator(config: AlignConfig, policy: Path) -> None:
    """Raise ConfigError for a saved discriminator of another kind than flags ask for, or that reads other inputs.

    ``policy`` has the policy's config, tokenizer and preprocessor.
    """
    folder = discriminator_folder(config)
    if folder is not None:
        files = files_folder(folder, "discriminator")
        check_kind_of(files, Variant.of(config.discriminator), where=folder)
        check_same_inputs(policy, files, where=folder)


def discriminator_folder(config: AlignConfig) -> Path | None:
    """``--discriminator``, or the mini's own where its policy plays against that kind; None: one is upcycled."""
    if config.discriminator.discriminator is not None:
        return Path(config.discriminator.discriminator)
    shipped = MINI_FOLDER / "discriminator"
    fits = config.model.model is None and read_variant(shipped) == Variant.of(config.discriminator)
    return shipped if fits else None


def discriminator_files(config: AlignConfig, policy: ModelFiles, dtype: torch.dtype) -> ModelFiles:
    """What checkpoints keep of the discriminator; one that is upcycled has the policy's tokenizer."""
    folder = discriminator_folder(config)
    if folder is not None:
        return model_files(folder, "discriminator", dtype=dtype)
    text = config_text(policy.files["config.json"], Variant.of(config.discriminator))
    return ModelFiles({**policy.files, "config.json": text.encode()})


def unseen_tokens(flags: DiscriminatorConfig, shape: Qwen3VLShape) -> frozenset[int]:
    """What ``--modality text`` takes from the discriminator's prompts: pads of images and videos, and their markers."""
    if flags.modality != "text":
        return frozenset()
    markers = (shape.vision_start_token_id, shape.vision_end_token_id)
    return frozenset((shape.image_token_id, shape.video_token_id, *markers))


def _size_line(config: AlignConfig, shape: Qwen3VLShape) -> str:
    """``shape`` is that of the policy."""
    variant = Variant.of(config.discriminator)
    start = discriminator_folder(config)
    if start is not None:
        shape = Qwen3VLShape.from_folder(files_folder(start, "discriminator"))
    total, per_token = (count / 1e6 for count in count_parameters(shape, variant.towers))
    return (
        f"discriminator: {'upcycled from the policy' if start is None else f'from {start}'}, {variant.as_flags()}; "
        f"{total:,.1f} M parameters, {per_token:,.1f} M of them without the experts that a token skips"
    )
