"""Fine-tune a Qwen3-VL on demonstrations, the method's first stage: ``prism-sft --model BASE --data SET``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prism_megatron.commands.starting.first_rank import FirstRank
from prism_megatron.commands.starting.foretold import foretold
from prism_megatron.commands.starting.named_models import policy_shape, world_size
from prism_megatron.commands.starting.on_ranks import in_world, main_on_ranks
from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.cli import inputs_named, named_mini, parse_over
from prism_megatron.config.stages.sft import SFTConfig, check_sft, check_sft_values, mini_sft
from prism_megatron.run.start import defaults_of, find_start

if TYPE_CHECKING:
    from prism_megatron.forecast.build import Planned

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


def foretell(config: SFTConfig, first: FirstRank) -> SFTConfig | None:
    """The configuration to begin with, once rank 0 has said what a step needs of a device, where that is wanted.

    None where the run is not to begin. Raises PrismError.
    """

    def plan() -> Planned:
        from prism_megatron.forecast.build import plan_sft

        shape = policy_shape(config.model, of_the_mini="base")
        return plan_sft(config, shape, world_size=world_size(config.parallel))

    return foretold(config, plan, first)


def run(config: SFTConfig) -> None:
    """One rank's work."""
    from prism_megatron.stages.sft.build import fine_tune_on

    in_world(config, fine_tune_on)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return main_on_ranks(
        argv, parse=parse, check=check, run=run, foretell=foretell, preload="prism_megatron.stages.sft.build"
    )
