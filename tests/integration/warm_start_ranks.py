"""What ranks run to warm a discriminator up, to align against it, and to compare what was saved of it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.stages.discriminator import DiscriminatorConfig
from prism_megatron.config.stages.warm_start import WarmStartConfig
from prism_megatron.engine.runtime import World
from prism_megatron.errors import PrismError
from prism_megatron.stages.align.build import align_on
from prism_megatron.stages.warm_start.build import warm_up_on
from tests.mini_players import mini_discriminator


def warm_up(world: World, config: WarmStartConfig) -> str:
    """What the run ended with: nothing, or the message of its PrismError."""
    try:
        warm_up_on(world, config)
    except PrismError as error:
        return str(error)
    return ""


def align(world: World, config: AlignConfig) -> None:
    """A whole alignment run."""
    align_on(world, config)


def discriminator_hash(world: World, folder: Path) -> str:
    """Of every weight of the discriminator that ``--discriminator FOLDER`` gives an alignment run."""
    config = replace(MINI_ALIGN, discriminator=DiscriminatorConfig(discriminator=str(folder)))
    engine = mini_discriminator(world, config)
    digest = hashlib.sha256()
    for name, tensor in sorted(engine.export_hf(), key=lambda named: named[0]):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
