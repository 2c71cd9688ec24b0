#!/usr/bin/env python
"""Measure whether fine-tuning on records learns from their images (``make image-use ARGS="--data FOLDER..."``)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.config.cli import parse_over
from prism_megatron.config.experiments.image_use import ImageUseConfig, run_of
from prism_megatron.engine.launch import PRELOAD, launch, report_error
from prism_megatron.errors import PrismError
from prism_megatron.terminal import guarded


def run(config: ImageUseConfig) -> None:
    """One rank's work."""
    from prism_megatron.experiments.image_use import measure_image_use

    measure_image_use(config)


def main() -> int:
    try:
        defaults = ImageUseConfig(data=(), output=Path("runs/image_use"))
        config = parse_over(defaults, sys.argv[1:], description=__doc__ or "")
        run_of(config)
    except PrismError as error:
        return report_error(error)
    return launch(
        run,
        config,
        model_parallel_size=1,
        world_size=config.data_parallel,
        preload=(*PRELOAD, "prism_megatron.experiments.image_use"),
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
