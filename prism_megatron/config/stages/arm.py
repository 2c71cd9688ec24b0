"""One arm of an experiment: a whole configuration under a name."""

from __future__ import annotations

from dataclasses import dataclass

from prism_megatron.config.stages.align import AlignConfig


@dataclass(frozen=True)
class Arm:
    """A configuration to play; ``random_discriminator`` replaces the discriminator's weights by noise."""

    name: str
    config: AlignConfig
    random_discriminator: bool = False
