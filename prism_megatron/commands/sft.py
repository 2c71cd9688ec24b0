"""Fine-tune a Qwen3-VL on demonstrations, the method's first stage: ``prism-sft --model BASE --data SET``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from prism_megatron.commands.named_models import policy_shape, world_size
from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.cli import inputs_named, named_mini, parse_over
from prism_megatron.config.engine.validate_layout import smallest_world
from prism_megatron.config.stages.sft import SFTConfig, check_sft, check_sft_values, mini_sft
from prism_megatron.engine.launch import PRELOAD, launch, report_error
from prism_megatron.errors import PrismError
from prism_megatron.run.start import defaults_of, find_start

STAGE = "sft"


def parse(argv: Sequence[str]) -> SFTConfig:
    """The configuration that was asked for, as ``commands.align.parse`` makes that of an alignment.

    Raises ConfigError as that does.
    """
    named = inputs_named(argv, "model", "data")
    mini = named_mini(argv)
    recipe = mini_sft(mini or ModelConfig().mini, records="data" in named)
    config = parse_over(
        defaults_of(argv, SFTConfig() if "model" in named and mini is None else recipe, stage=STAGE),
        argv,
        description="Fine-tune a policy on demonstrations. Without --model and --data the built-in mini world learns "
        "from its teacher.",
    )
    check_sft_values(config)
    return config


def check(config: SFTConfig) -> None:
    """Raise PrismError for what cannot work; what a hub id stands for is downloaded."""
    find_start(config, stage=STAGE)
    check_sft(config, policy_shape(config.model, of_the_mini="base"), world_size=world_size(config.parallel))


def run(config: SFTConfig) -> None:
    """One rank's work."""
    from prism_megatron.engine.runtime import start, stop
    from prism_megatron.stages.sft.build import fine_tune_on

    world = start(config.parallel, seed=config.seed)
    fine_tune_on(world, config)
    stop(world)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        check(config)
    except PrismError as error:
        return report_error(error)
    return launch(
        run,
        config,
        model_parallel_size=config.parallel.model_parallel_size,
        world_size=smallest_world(config.parallel),
        preload=(*PRELOAD, "prism_megatron.stages.sft.build"),
    )
