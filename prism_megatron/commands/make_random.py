"""Write a model folder of random weights: ``prism-make-random --config 4B --save DIR``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from prism_megatron.config.tools.convert import MakeRandomConfig
from prism_megatron.engine.launch import report_error
from prism_megatron.errors import PrismError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    config = tyro.cli(MakeRandomConfig, args=sys.argv[1:] if argv is None else argv, description=__doc__)
    from prism_megatron.jobs.random_model import make_random

    try:
        make_random(config)
    except PrismError as error:
        return report_error(error)
    return 0
