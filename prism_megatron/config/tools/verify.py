"""The configuration of ``prism-verify``, and what can be refused before any process starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import tyro

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig, check_settled
from prism_megatron.config.engine.validate_layout import check_layout, check_world
from prism_megatron.config.fields import check_fields
from prism_megatron.config.validate import check_recompute
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class VerifyConfig:
    """Is a folder's model the same in transformers and here, forward and backward, in this layout?

    A discriminator folder is held against transformers' trunk, with plain torch experts where it has them: scores and
    every gradient.
    """

    # All ranks wait for the first, which runs transformers' model alone.
    parallel: tyro.conf.OmitArgPrefixes[ParallelConfig] = field(
        default_factory=lambda: ParallelConfig(distributed_timeout_minutes=240)
    )
    recompute: tyro.conf.OmitArgPrefixes[RecomputeConfig] = field(default_factory=RecomputeConfig)
    hf: str | None = None
    """a Qwen3-VL or a discriminator with its tokenizer, chat template and preprocessor: model folder, hub id
    (org/name@revision), run folder or checkpoint; the last two are written as a model folder for as long as it takes"""
    pack: bool = False
    """pack samples into one row instead of padding them"""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """number format of our parameters; bf16 is allowed twice the error that transformers makes in bf16"""
    image: tuple[str, ...] = ()
    """pictures to show instead of the built-in ones"""
    by_layer: bool = False
    """compare one layer at a time in one process, as is done anyway where the two models do not fit into host memory"""
    json: bool = False
    """print the result as one last line of JSON"""


def model_name(config: VerifyConfig) -> str:
    """What ``--hf`` names. Raises ConfigError where it is left out."""
    if config.hf is None:
        raise ConfigError("name the model: --hf MODEL, a model folder, a hub id, a run folder or a checkpoint")
    return config.hf


def check_verify(
    config: VerifyConfig, shape: Qwen3VLShape, *, world_size: int, experts_per_tower: int | None = None
) -> None:
    """Raise ConfigError, naming the flag, for a layout that the model or the number of processes rules out.

    ``experts_per_tower`` is a discriminator's, 0 for one without experts; None for a policy.
    """
    parallel = config.parallel
    check_fields(parallel)
    check_layout(parallel, shape, experts_per_tower=experts_per_tower or 0)
    if experts_per_tower is not None and config.by_layer:
        raise ConfigError("a discriminator is compared whole; leave --by-layer out")
    if config.by_layer:
        check_by_layer(config, shape)
    check_recompute(config.recompute)
    check_settled(config.recompute)
    check_world(parallel, world_size)


def check_by_layer(config: VerifyConfig, shape: Qwen3VLShape) -> None:
    """Raise ConfigError for what a comparison layer by layer cannot do."""
    if config.dtype != "fp32":
        raise ConfigError("a comparison layer by layer computes in float32; use --dtype fp32")
    if shape.text.num_layers < 2:
        raise ConfigError("a comparison layer by layer needs two language layers; leave --by-layer out")
    if config.by_layer and config.pack:
        raise ConfigError("a comparison layer by layer runs sample by sample; leave --pack or --by-layer out")
