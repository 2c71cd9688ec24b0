"""Is a Qwen3-VL the same model here as in transformers? ``prism-verify --hf MODEL --tp 2``."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from model_providers.moe_discriminator.folder import is_discriminator, read_variant
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.cli import parse_over
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.validate_layout import smallest_world
from prism_megatron.config.tools.verify import VerifyConfig, check_by_layer, check_verify, model_name
from prism_megatron.conversion.checkpoints.folder import is_checkpoint
from prism_megatron.conversion.checkpoints.model_names import folder_of
from prism_megatron.engine.launch import PRELOAD, launch, report_error
from prism_megatron.errors import ConfigError, PrismError

GIB = 2**30


def run(config: VerifyConfig) -> None:
    """One rank's work."""
    from prism_megatron.parity.verify import run as run_verification

    run_verification(config)


@contextmanager
def readable(config: VerifyConfig) -> Iterator[VerifyConfig]:
    """The configuration with a model folder in place of what ``--hf`` names.

    transformers reads no checkpoint: one is written as a model folder, which is removed afterwards. Raises PrismError.
    """
    named = folder_of(model_name(config), flag="--hf", fetch=True)
    if not is_checkpoint(named):
        yield dataclasses.replace(config, hf=str(named))
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"--hf {config.hf} is read as the checkpoint {named}, which one process has to write as a model folder; "
            "start this without torchrun, or name a model folder"
        )
    from prism_megatron.config.tools.convert import ToHFConfig
    from prism_megatron.jobs.convert import to_hf

    with tempfile.TemporaryDirectory(prefix="prism-verify-") as aside:
        folder = Path(aside) / named.name
        to_hf(ToHFConfig(load=str(named), save=str(folder)), say=lambda text: print(text, file=sys.stderr, flush=True))
        yield dataclasses.replace(config, hf=str(folder))


def checked(config: VerifyConfig) -> VerifyConfig:
    """The configuration, by layer where memory asks for it. Raises PrismError for bad input; no weights are read."""
    from prism_megatron.jobs.model_folder import check_model_folder

    folder = Path(model_name(config))
    check_model_folder(folder)
    shape = Qwen3VLShape.from_folder(folder)
    smallest, present = smallest_world(config.parallel), int(os.environ.get("WORLD_SIZE", "1"))
    size = present if present > 1 else smallest
    experts_per_tower = None
    if is_discriminator(folder):
        towers = read_variant(folder).towers
        experts_per_tower = 0 if towers is None else towers.experts_per_tower
    check_verify(config, shape, world_size=size, experts_per_tower=experts_per_tower)
    if config.image:
        from prism_megatron.data.pictures.files import open_image

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


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    try:
        named = parse_over(VerifyConfig(), sys.argv[1:] if argv is None else argv, description=__doc__ or "")
        with readable(named) as found:
            config = checked(found)
            return launch(
                run,
                config,
                model_parallel_size=config.parallel.model_parallel_size,
                world_size=smallest_world(config.parallel),
                preload=(*PRELOAD, "prism_megatron.parity.verify"),
            )
    except PrismError as error:
        return report_error(error)
