#!/usr/bin/env python
"""Write a model folder of random weights: ``python tools/make_random.py --config 4B --save DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from prism_megatron.config.convert import MakeRandomConfig
from prism_megatron.engine.launch import report_error
from prism_megatron.errors import PrismError


def main() -> int:
    config = tyro.cli(MakeRandomConfig, description=__doc__)
    from prism_megatron.jobs.random_model import make_random

    try:
        make_random(config)
    except PrismError as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
