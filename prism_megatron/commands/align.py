"""Align a Qwen3-VL policy against a mixture-of-experts discriminator: ``prism-align --tp 4 --pp 2``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prism_megatron.commands.starting.first_rank import FirstRank
from prism_megatron.commands.starting.foretold import foretold
from prism_megatron.commands.starting.named_models import named_shapes, world_size
from prism_megatron.commands.starting.on_ranks import in_world, main_on_ranks
from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.cli import inputs_named, named_mini, parse_over
from prism_megatron.config.engine.validate_layout import smallest_world
from prism_megatron.config.experiments.mini import mini_align
from prism_megatron.config.stages.align import AlignConfig
from prism_megatron.config.validate import check_align, check_align_values, towers_layout
from prism_megatron.run.start import defaults_of, find_start

if TYPE_CHECKING:
    from prism_megatron.forecast.build import Planned

STAGE = "align"


def parse(argv: Sequence[str]) -> AlignConfig:
    """The configuration that was asked for; ``argv`` is without the program's name.

    Without a model, or with ``--mini``, by flag or by YAML, a mini world's recipe stands in for the field defaults: the
    one for records where data is named, else the one for scenes. A run that goes on starts from its own configuration.
    ``--help`` and unknown flags end the process as command-line tools do. Raises ConfigError for a bad YAML file,
    for a value out of range and for a folder of data that does not exist, CheckpointError where there is nothing to go
    on from.
    """
    named = inputs_named(argv, "model", "data")
    mini = named_mini(argv)
    recipe = mini_align(mini or ModelConfig().mini, records="data" in named)
    config = parse_over(
        defaults_of(argv, AlignConfig() if "model" in named and mini is None else recipe, stage=STAGE),
        argv,
        description="Align a policy against a discriminator, adversarially and on-policy (PRISM). Without --model and "
        "--data the built-in mini world runs.",
    )
    check_align_values(config)
    return config


def check(config: AlignConfig) -> None:
    """Raise PrismError for what cannot work; what a hub id stands for is downloaded."""
    find_start(config, stage=STAGE)
    shape, judge = named_shapes(config.model, config.discriminator, scenes=config.data.data is None)
    size = world_size(config.parallel, towers_layout(config, shape))
    check_align(config, shape, world_size=size, discriminator=judge)


def foretell(config: AlignConfig, first: FirstRank) -> AlignConfig | None:
    """The configuration to begin with, once rank 0 has said what a step needs of a device, where that is wanted.

    None where the run is not to begin. Raises PrismError.
    """

    def plan() -> Planned:
        from prism_megatron.forecast.build import plan_align

        shape, judge = named_shapes(config.model, config.discriminator, scenes=config.data.data is None)
        size = world_size(config.parallel, towers_layout(config, shape))
        return plan_align(config, shape, judge, world_size=size)

    return foretold(config, plan, first)


def run(config: AlignConfig) -> None:
    """One rank's work."""
    from prism_megatron.stages.align.build import align_on

    in_world(config, align_on)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return main_on_ranks(
        argv,
        parse=parse,
        check=check,
        run=run,
        foretell=foretell,
        preload="prism_megatron.stages.align.build",
        processes=lambda config: smallest_world(config.parallel, towers_layout(config)),
    )
