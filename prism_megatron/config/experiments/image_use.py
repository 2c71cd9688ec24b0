"""What ``make image-use`` measures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from prism_megatron.config.architecture.model import ALL_VISION, FreezeGroup
from prism_megatron.config.fields import AT_LEAST_ONE, POSITIVE, Range
from prism_megatron.config.stages.sft import MINI_SFT_RECORDS, SFTConfig, check_sft_values
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class ImageUseConfig:
    """Supervised fine-tuning of the mini on records, with their images and with blank ones."""

    data: tuple[Path, ...]
    """files or folders of demonstrations, in any format of docs/data.md"""
    output: Path
    """folder for image_use.json and image_use.md"""
    epochs: Annotated[int, AT_LEAST_ONE] = 6
    """how often everything is seen"""
    rows_per_step: Annotated[int, AT_LEAST_ONE] = 2
    """packed rows of 1,024 tokens that one optimizer step learns from"""
    lr: Annotated[float, POSITIVE] = 3e-3
    """peak learning rate"""
    freeze: tuple[FreezeGroup, ...] = ALL_VISION
    """parts of the model that stay as loaded"""
    max_pixels: Annotated[int | None, AT_LEAST_ONE] = 96 * 96
    """most pixels of an image, which is made smaller; the mini's own pictures have 96 by 96, None leaves them as they
    are"""
    validation_share: Annotated[float, Range(above=0, below=1)] = 0.1
    """share of the records that is held out, chosen by their ids"""
    data_parallel: Annotated[int, AT_LEAST_ONE] = 2
    """processes to start"""


def run_of(config: ImageUseConfig) -> SFTConfig:
    """The mini's run on records, asked about its held-out part at the end alone.

    Raises ConfigError where the run's own checks do, and without records.
    """
    if not config.data:
        raise ConfigError("name sets of demonstrations with images: --data FOLDER...")
    data = replace(
        MINI_SFT_RECORDS.data,
        data=config.data,
        epochs=config.epochs,
        rows_per_step=config.rows_per_step,
        validation_share=config.validation_share,
        max_pixels=config.max_pixels,
    )
    policy = replace(MINI_SFT_RECORDS.policy, lr=config.lr)
    run = replace(MINI_SFT_RECORDS, data=data, policy=policy, freeze=config.freeze, eval_every=0)
    check_sft_values(run)
    return run
