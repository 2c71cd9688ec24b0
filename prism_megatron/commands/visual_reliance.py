"""How much do a policy's words depend on the image? ``prism-visual-reliance --model POLICY --data FOLDER``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from prism_megatron.commands.starting.named_models import policy_shape, world_size
from prism_megatron.commands.starting.on_ranks import in_world, main_on_ranks
from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.cli import named_value, parse_over
from prism_megatron.config.engine.validate_layout import check_layout, check_world
from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.tools.visual_reliance import VisualRelianceConfig, check_visual_reliance


def parse(argv: Sequence[str]) -> VisualRelianceConfig:
    """The configuration that was asked for; of scenes, asked as the mini is trained on them.

    Raises ConfigError for one that cannot work.
    """
    fresh = VisualRelianceConfig()
    if named_value(argv, "scenes") is not None:
        fresh = replace(fresh, system_prompt=MINI_ALIGN.data.system_prompt)
    config = parse_over(fresh, argv, description=VisualRelianceConfig.__doc__ or "")
    check_visual_reliance(config)
    return config


def check(config: VisualRelianceConfig) -> None:
    """Raise PrismError for what cannot work; what a hub id stands for is downloaded."""
    check_layout(config.parallel, policy_shape(ModelConfig(config.model)), experts_per_tower=0)
    check_world(config.parallel, world_size(config.parallel))


def run(config: VisualRelianceConfig) -> None:
    """One rank's work."""
    from prism_megatron.stages.visual_reliance.build import measure_on

    in_world(config, measure_on)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return main_on_ranks(argv, parse=parse, check=check, run=run, preload="prism_megatron.stages.visual_reliance.build")
