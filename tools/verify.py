#!/usr/bin/env python
"""Is a folder's Qwen3-VL the same model here as in transformers? ``python tools/verify.py --hf DIR --tp 2``."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model_providers.moe_discriminator.folder import is_discriminator, read_variant
from prism_megatron.config.cli import parse_over
from prism_megatron.config.parallel import ParallelConfig
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.config.validate_layout import smallest_world
from prism_megatron.config.verify import VerifyConfig, check_by_layer, check_verify, model_folder
from prism_megatron.engine.launch import PRELOAD, launch, report_error
from prism_megatron.errors import ConfigError, PrismError

GIB = 2**30


def run(config: VerifyConfig) -> None:
    """One rank's work."""
    from prism_megatron.parity.verify import run as run_verification

    run_verification(config)


def checked(config: VerifyConfig) -> VerifyConfig:
    """The configuration, by layer where memory asks for it. Raises PrismError for bad input; no weights are read."""
    folder = model_folder(config)
    shape = Qwen3VLShape.from_folder(folder)
    smallest, present = smallest_world(config.parallel), int(os.environ.get("WORLD_SIZE", "1"))
    size = present if present > 1 else smallest
    experts_per_tower = None
    if is_discriminator(folder):
        towers = read_variant(folder).towers
        experts_per_tower = 0 if towers is None else towers.experts_per_tower
    check_verify(config, shape, world_size=size, experts_per_tower=experts_per_tower)
    if config.image:
        from prism_megatron.data.images import open_image

        for path in config.image:
            open_image(Path(path))
    import psutil

    from prism_megatron.parity.plan import planned_bytes

    planned = planned_bytes(folder, config.dtype, copies=size // config.parallel.model_parallel_size)
    available = psutil.virtual_memory().available
    if planned > available and experts_per_tower is not None:
        raise ConfigError(
            f"the two discriminators take about {planned / GIB:.0f} GiB, and {available / GIB:.0f} GiB are available; "
            "verify it on a larger host"
        )
    if planned > available and not config.by_layer:
        print(
            f"the two models take about {planned / GIB:.0f} GiB, and {available / GIB:.0f} GiB are available: "
            "comparing layer by layer",
            flush=True,
        )
        config = dataclasses.replace(config, by_layer=True)
        check_by_layer(config, shape)
    if config.by_layer and present > 1:
        raise ConfigError("a comparison layer by layer runs in one process; start it with plain python")
    if config.by_layer and size > 1:
        print("layer by layer runs in one process: the layout is not tried", flush=True)
        config = dataclasses.replace(config, parallel=ParallelConfig())
    return config


def main() -> int:
    try:
        config = checked(parse_over(VerifyConfig(), sys.argv[1:], description=__doc__ or ""))
    except PrismError as error:
        return report_error(error)
    parallel = config.parallel
    return launch(
        run,
        config,
        model_parallel_size=parallel.model_parallel_size,
        world_size=smallest_world(parallel),
        preload=(*PRELOAD, "prism_megatron.parity.verify"),
    )


if __name__ == "__main__":
    sys.exit(main())
