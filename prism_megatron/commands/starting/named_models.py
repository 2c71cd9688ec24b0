"""What the commands of stages look up of the models that flags name, before any process starts."""

from __future__ import annotations

import os
from pathlib import Path

from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.validate_layout import smallest_world
from prism_megatron.config.stages.discriminator import DiscriminatorConfig
from prism_megatron.conversion.checkpoints.folder import files_folder
from prism_megatron.conversion.checkpoints.model_names import (
    MiniPolicy,
    discriminator_folder,
    folder_of,
    policy_folder,
    upcycled_folder,
)
from prism_megatron.data.reading.model_files import check_model_files


def named_shapes(
    model: ModelConfig, discriminator: DiscriminatorConfig, *, scenes: bool
) -> tuple[Qwen3VLShape, Qwen3VLShape | None]:
    """The sizes of the policy and of a discriminator that is not made of it; what a hub id stands for is downloaded.

    ``scenes``: they play on those of the mini world. Raises PrismError where a name stands for nothing, or for another
    role, and where the files beside the weights are not all there or do not fit the model. Weights are looked at when
    they are loaded.
    """
    judge = discriminator_folder(discriminator.discriminator, fetch=True)
    if judge is not None:
        return policy_shape(model), _checked_shape(files_folder(judge, "discriminator"))
    upcycled = upcycled_folder(model.mini, scenes=scenes)
    return policy_shape(model), None if upcycled is None else _checked_shape(upcycled)


def policy_shape(model: ModelConfig, *, of_the_mini: MiniPolicy = "policy") -> Qwen3VLShape:
    """The sizes of the policy alone. Raises PrismError as :func:`named_shapes`."""
    folder = policy_folder(model.model, of_the_mini=of_the_mini, mini=model.mini, fetch=True)
    return _checked_shape(files_folder(folder, "policy"))


def shape_of(name: str, *, flag: str) -> Qwen3VLShape:
    """The sizes of the policy that ``flag`` names. Raises PrismError as :func:`named_shapes`."""
    return _checked_shape(files_folder(folder_of(name, "policy", flag=flag, fetch=True), "policy"))


def _checked_shape(folder: Path) -> Qwen3VLShape:
    shape = Qwen3VLShape.from_folder(folder)
    check_model_files(folder, shape)
    return shape


def world_size(parallel: ParallelConfig, towers: ParallelConfig | None = None) -> int:
    """How many processes there will be: those that torchrun started, or the fewest that the layout takes.

    ``towers`` is that of a discriminator's experts.
    """
    present = int(os.environ.get("WORLD_SIZE", "1"))
    return present if present > 1 else smallest_world(parallel, towers)
