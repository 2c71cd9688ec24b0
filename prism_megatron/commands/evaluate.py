"""How many questions does a model answer right? ``prism-evaluate MODEL --data SET... --output FOLDER``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prism_megatron.commands.starting.named_models import shape_of
from prism_megatron.commands.starting.on_ranks import in_world, main_on_ranks
from prism_megatron.config.cli import parse_over
from prism_megatron.config.tools.evaluate import EvaluateConfig, check_evaluate
from prism_megatron.errors import ConfigError
from prism_megatron.evaluation.benchmark.folder import holds_evaluation, read_evaluation
from prism_megatron.stages.evaluate.identity import check_same_asked


def parse(argv: Sequence[str]) -> EvaluateConfig:
    """The configuration that was asked for. Raises ConfigError for one that cannot work."""
    config = parse_over(EvaluateConfig(), argv, description=EvaluateConfig.__doc__ or "")
    check_evaluate(config)
    return config


def check(config: EvaluateConfig) -> None:
    """Raise PrismError for what cannot work; what a hub id stands for is downloaded."""
    check_same_asked(config)
    if config.against is not None:
        _check_base(config.against)
    if config.url is None:
        shape_of(config.model, flag="MODEL")
    elif config.endpoint.served_files is not None:
        shape_of(config.endpoint.served_files, flag="--served-files")


def _check_base(against: str) -> None:
    if holds_evaluation(Path(against)):
        read_evaluation(Path(against))
        return
    try:
        shape_of(against, flag="--against")
    except ConfigError as error:
        raise ConfigError(f"{error}, or the --output of a finished evaluation") from error


def run(config: EvaluateConfig) -> None:
    """One rank's work."""
    from prism_megatron.stages.evaluate.build import evaluate_on

    in_world(config, evaluate_on)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return main_on_ranks(
        argv,
        parse=parse,
        check=check,
        run=run,
        preload="prism_megatron.stages.evaluate.build",
        processes=lambda config: config.ranks,
    )
