"""Warm a discriminator up on preference pairs before the game: ``prism-warm-start``."""

from __future__ import annotations

from collections.abc import Sequence

from prism_megatron.commands.starting.named_models import named_shapes, world_size
from prism_megatron.commands.starting.on_ranks import in_world, main_on_ranks
from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.cli import inputs_named, named_mini, parse_over
from prism_megatron.config.engine.validate_layout import smallest_world
from prism_megatron.config.stages.warm_start import WarmStartConfig, check_warm_start, mini_warm_start
from prism_megatron.config.validate import check_values, towers_layout
from prism_megatron.run.start import defaults_of, find_start

STAGE = "warm-start"


def parse(argv: Sequence[str]) -> WarmStartConfig:
    """The configuration that was asked for, as ``commands.align.parse`` makes that of an alignment.

    Raises ConfigError as that does.
    """
    named = inputs_named(argv, "model", "data", "pairs")
    mini = named_mini(argv)
    defaults = WarmStartConfig()
    if "model" not in named or mini is not None:
        defaults = mini_warm_start(mini or ModelConfig().mini, records="data" in named, pairs="pairs" in named)
    config = parse_over(
        defaults_of(argv, defaults, stage=STAGE),
        argv,
        description="Warm a discriminator up on preference pairs: references against samples of the policy, or --pairs "
        "of a file. Without flags the built-in mini world's discriminator is made anew, in few steps.",
    )
    check_values(config)
    return config


def check(config: WarmStartConfig) -> None:
    """Raise PrismError for what cannot work; what a hub id stands for is downloaded."""
    find_start(config, stage=STAGE)
    scenes = config.data.data is None and config.pairs.pairs is None
    shape, judge = named_shapes(config.model, config.discriminator, scenes=scenes)
    size = world_size(config.parallel, towers_layout(config, shape))
    check_warm_start(config, shape, world_size=size, discriminator=judge)


def run(config: WarmStartConfig) -> None:
    """One rank's work."""
    from prism_megatron.stages.warm_start.build import warm_up_on

    in_world(config, warm_up_on)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return main_on_ranks(
        argv,
        parse=parse,
        check=check,
        run=run,
        preload="prism_megatron.stages.warm_start.build",
        processes=lambda config: smallest_world(config.parallel, towers_layout(config)),
    )
