"""Reinforce a Qwen3-VL policy by answers that can be checked: ``prism-rlvr --tp 2 --pp 2 --algo grpo``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prism_megatron.commands.starting.first_rank import FirstRank
from prism_megatron.commands.starting.foretold import foretold
from prism_megatron.commands.starting.named_models import policy_shape, world_size
from prism_megatron.commands.starting.on_ranks import in_world, main_on_ranks
from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.cli import inputs_named, named_mini, named_value, parse_over
from prism_megatron.config.experiments.mini_rlvr import mini_rlvr
from prism_megatron.config.stages.rlvr import RLVRConfig, check_rlvr, check_rlvr_values
from prism_megatron.run.start import defaults_of, find_start

if TYPE_CHECKING:
    from prism_megatron.forecast.build import Planned

STAGE = "rlvr"


def parse(argv: Sequence[str]) -> RLVRConfig:
    """The configuration that was asked for, as ``commands.align.parse`` makes that of an alignment.

    ``--algo``, by flag or by YAML, is read first: what it states are the defaults of all others. Raises ConfigError as
    that does, and for an algorithm that there is not.
    """
    named = inputs_named(argv, "model", "data")
    algo = named_value(argv, "algo") or RLVRConfig().algo
    mini = named_mini(argv)
    fresh = RLVRConfig().of(algo)
    if "model" not in named or mini is not None:
        fresh = mini_rlvr(algo, mini=mini or ModelConfig().mini, records="data" in named)
    config = parse_over(
        defaults_of(argv, fresh, stage=STAGE),
        argv,
        description="Reinforce a policy by answers that can be checked. Without --model and --data the built-in mini "
        "world runs.",
    )
    check_rlvr_values(config)
    return config


def check(config: RLVRConfig) -> None:
    """Raise PrismError for what cannot work; what a hub id stands for is downloaded."""
    find_start(config, stage=STAGE)
    check_rlvr(config, policy_shape(config.model, of_the_mini="aligned"), world_size=world_size(config.parallel))


def foretell(config: RLVRConfig, first: FirstRank) -> RLVRConfig | None:
    """The configuration to begin with, once rank 0 has said what a step needs of a device, where that is wanted.

    None where the run is not to begin. Raises PrismError.
    """

    def plan() -> Planned:
        from prism_megatron.forecast.build import plan_rlvr

        shape = policy_shape(config.model, of_the_mini="aligned")
        return plan_rlvr(config, shape, world_size=world_size(config.parallel))

    return foretold(config, plan, first)


def run(config: RLVRConfig) -> None:
    """One rank's work."""
    from prism_megatron.stages.rlvr.build import reinforce_on

    in_world(config, reinforce_on)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return main_on_ranks(
        argv, parse=parse, check=check, run=run, foretell=foretell, preload="prism_megatron.stages.rlvr.build"
    )
