"""Which prompts does a policy answer right now and then? ``prism-select-prompts --model POLICY --data FOLDER``."""

from __future__ import annotations

from collections.abc import Sequence

from prism_megatron.commands.starting.named_models import policy_shape
from prism_megatron.commands.starting.on_ranks import in_world, main_on_ranks
from prism_megatron.config.architecture.model import ModelConfig
from prism_megatron.config.cli import inputs_named, named_mini, parse_over
from prism_megatron.config.stages.select_prompts import SelectPromptsConfig, check_select_prompts, mini_select
from prism_megatron.stages.select_prompts.identity import check_same_asked


def parse(argv: Sequence[str]) -> SelectPromptsConfig:
    """The configuration that was asked for; with ``--mini`` over that world's recipe for scenes.

    Raises ConfigError for one that cannot work.
    """
    mini = named_mini(argv, section=None)
    of_records = mini is None or "data" in inputs_named(argv, "data")
    defaults = SelectPromptsConfig() if mini is None or of_records else mini_select(mini)
    config = parse_over(defaults, argv, description=SelectPromptsConfig.__doc__ or "")
    check_select_prompts(config)
    return config


def check(config: SelectPromptsConfig) -> None:
    """Raise PrismError for what cannot work; what a hub id stands for is downloaded."""
    check_same_asked(config)
    policy_shape(ModelConfig(config.model, mini=config.mini), of_the_mini="aligned")


def run(config: SelectPromptsConfig) -> None:
    """One rank's work."""
    from prism_megatron.stages.select_prompts.build import select_on

    in_world(config, select_on)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return main_on_ranks(
        argv,
        parse=parse,
        check=check,
        run=run,
        preload="prism_megatron.stages.select_prompts.build",
        processes=lambda config: config.ranks,
    )
