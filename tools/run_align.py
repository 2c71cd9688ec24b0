#!/usr/bin/env python
"""Align a Qwen3-VL policy against a mixture-of-experts discriminator: ``torchrun tools/run_align.py --tp 4 --pp 2``."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.config.align import AlignConfig
from prism_megatron.config.cli import parse
from prism_megatron.config.mini_world import policy_folder
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.config.validate import check_align
from prism_megatron.config.validate_layout import smallest_world
from prism_megatron.conversion.checkpoint_folder import files_folder
from prism_megatron.engine.launch import PRELOAD, launch, report_error
from prism_megatron.errors import PrismError
from prism_megatron.run.start import defaults_of, find_start


def run(config: AlignConfig) -> None:
    """One rank's work."""
    from prism_megatron.engine.runtime import start, stop
    from prism_megatron.stages.align.build import align_on

    world = start(config.parallel, seed=config.seed)
    align_on(world, config)
    stop(world)


def main() -> int:
    try:
        config = parse(sys.argv[1:], resume=partial(defaults_of, stage="align"))
        find_start(config, stage="align")
        parallel = config.parallel
        smallest, present = smallest_world(parallel), int(os.environ.get("WORLD_SIZE", "1"))
        shape = Qwen3VLShape.from_folder(files_folder(policy_folder(config.model.model), "policy"))
        saved = config.discriminator.discriminator
        judge = None if saved is None else Qwen3VLShape.from_folder(files_folder(Path(saved), "discriminator"))
        check_align(config, shape, world_size=present if present > 1 else smallest, discriminator=judge)
    except PrismError as error:
        return report_error(error)
    return launch(
        run,
        config,
        model_parallel_size=parallel.model_parallel_size,
        world_size=smallest,
        preload=(*PRELOAD, "prism_megatron.stages.align.build"),
    )


if __name__ == "__main__":
    sys.exit(main())
