"""What a run's discriminator is made of: a saved one, or the policy with experts in place of its MLPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from model_providers.moe_discriminator.folder import check_kind_of, config_text, read_variant
from model_providers.moe_discriminator.mapping import count_parameters
from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.upcycle import UpcycledSource
from model_providers.moe_discriminator.variant import Variant
from prism_megatron.config.architecture.model import MiniWorld
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.experiments.mini_world import mini_folder
from prism_megatron.config.stages.discriminator import DiscriminatorConfig
from prism_megatron.conversion.checkpoints.folder import ModelFiles, companions_folder, files_folder
from prism_megatron.conversion.checkpoints.model_names import discriminator_folder, upcycled_folder
from prism_megatron.data.render import Renderer
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.host.execution import PLAIN, Execution
from prism_megatron.engine.runtime import World
from prism_megatron.game.same_inputs import check_same_inputs
from prism_megatron.training.batches import BatchFormat
from prism_megatron.training.roles import batch_format, hf_tensors, load_weights, model_files


@dataclass(frozen=True)
class DiscriminatorOrigin:
    """The kind that flags ask for, and the ``folder`` it is loaded from; None: it is upcycled."""

    flags: DiscriminatorConfig
    folder: Path | None
    base: Path | None = None
    """the model folder that it is upcycled from; None: the policy's"""

    @classmethod
    def of(
        cls, flags: DiscriminatorConfig, *, of_the_mini: bool, mini: MiniWorld = "habits", scenes: bool = True
    ) -> DiscriminatorOrigin:
        """``--discriminator``, or where the mini's own policy plays (``of_the_mini``) its shipped one of that kind.

        A fresh one judges the ``scenes`` of that world, or records.

        Raises PrismError where the name stands for no discriminator.
        """
        if (named := discriminator_folder(flags.discriminator)) is not None:
            return cls(flags, named)
        shipped = mini_folder(mini) / "discriminator"
        fits = of_the_mini and read_variant(shipped) == Variant.of(flags)
        return cls(flags, shipped if fits else None, upcycled_folder(mini, scenes=scenes))

    def check(self, policy: Path) -> None:
        """Raise ConfigError for a saved one of another kind than flags ask for, or that reads other inputs.

        ``policy`` has the policy's config, tokenizer and preprocessor.
        """
        if self.folder is not None:
            files = files_folder(self.folder, "discriminator")
            check_kind_of(files, Variant.of(self.flags), where=self.folder)
            check_same_inputs(policy, files, where=self.folder)
        elif self.base is not None:
            check_same_inputs(policy, self.base, where=self.base)

    def check_checkpoint(self, folder: Path) -> None:
        """Raise ConfigError where the run of the checkpoint ``folder`` had a discriminator of another kind."""
        files = companions_folder(folder, "discriminator")
        check_kind_of(files, Variant.of(self.flags), where=folder, flag="--load")

    def build(
        self,
        policy: Path,
        shape: Qwen3VLShape,
        *,
        world: World,
        dtype: torch.dtype,
        optimizer: OptimizerConfig,
        total_steps: int,
        seed: int,
        execution: Execution = PLAIN,
    ) -> MegatronEngine:
        """The role with its weights. ``policy`` and its ``shape`` count where it is upcycled, keyed by ``seed``."""
        if self.base is not None:
            policy, shape = self.base, Qwen3VLShape.from_folder(self.base)
        engine = MegatronEngine(
            name="discriminator",
            provider=self._provider(shape, execution),
            world=world,
            dtype=dtype,
            optimizer=optimizer,
            total_steps=total_steps,
            fast=execution.fast,
        )
        if self.folder is not None:
            load_weights(engine, self.folder)
        else:
            engine.load_hf(
                UpcycledSource(
                    hf_tensors(policy, shape),
                    shape,
                    Variant.of(self.flags).towers,
                    seed=seed,
                    expert_std=self.flags.upcycle_noise,
                    init_std=self.flags.router_std,
                )
            )
        return engine

    def _provider(self, policy: Qwen3VLShape, execution: Execution) -> DiscriminatorProvider:
        variant = Variant.of(self.flags)
        make: Callable[..., DiscriminatorProvider] = partial(
            DiscriminatorProvider, policy, variant.towers, modality=variant.modality
        )
        if self.folder is not None:
            make = partial(DiscriminatorProvider.from_folder, files_folder(self.folder, "discriminator"))
        return make(
            head_dropout=self.flags.head_dropout,
            load_balance_scope=self.flags.load_balance_scope,
            router_z_loss=self.flags.router_z_loss,
            freeze_vision=self.flags.freeze_vision,
            execution=execution,
        )

    def _shape(self, policy: Qwen3VLShape) -> Qwen3VLShape:
        if self.folder is not None:
            return Qwen3VLShape.from_folder(files_folder(self.folder, "discriminator"))
        return policy if self.base is None else Qwen3VLShape.from_folder(self.base)

    def files(self, policy: ModelFiles, dtype: torch.dtype) -> ModelFiles:
        """What checkpoints keep of it; one that is upcycled has the tokenizer of what it was made of."""
        if self.folder is not None:
            return model_files(self.folder, "discriminator", dtype=dtype)
        if self.base is not None:
            policy = model_files(self.base, "policy", dtype=dtype)
        text = config_text(policy.files["config.json"], Variant.of(self.flags))
        return ModelFiles({**policy.files, "config.json": text.encode()})

    def batch_format(
        self, shape: Qwen3VLShape, renderer: Renderer, *, world: World, execution: Execution
    ) -> BatchFormat:
        """How both players' rows become tensors; ``shape`` is the policy's."""
        return batch_format(
            renderer,
            world,
            execution,
            unseen=unseen_tokens(self.flags, shape),
            share_prompts=True,
        )

    def size_line(self, policy: Qwen3VLShape) -> str:
        """Where it comes from, its kind and how large it is, for people."""
        variant = Variant.of(self.flags)
        total, per_token = (count / 1e6 for count in count_parameters(self._shape(policy), variant.towers))
        origin = f"upcycled from {self.base or 'the policy'}" if self.folder is None else f"from {self.folder}"
        return (
            f"discriminator: {origin}, {variant.as_flags()}; "
            f"{total:,.1f} M parameters, {per_token:,.1f} M of them without the experts that a token skips"
        )


def unseen_tokens(flags: DiscriminatorConfig, shape: Qwen3VLShape) -> frozenset[int]:
    """What ``--modality text`` takes from the discriminator's prompts: pads of images and videos, and their markers."""
    if flags.modality != "text":
        return frozenset()
    markers = (shape.vision_start_token_id, shape.vision_end_token_id)
    return frozenset((shape.image_token_id, shape.video_token_id, *markers))
