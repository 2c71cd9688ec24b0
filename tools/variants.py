#!/usr/bin/env python
"""Play the variants of the method on the mini world and show them side by side (``make variants``)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.config.cli import parse_over
from prism_megatron.config.experiments.variants import VariantsConfig
from prism_megatron.engine.launch import PRELOAD, launch, report_error
from prism_megatron.errors import PrismError
from prism_megatron.terminal import guarded


def run(config: VariantsConfig) -> None:
    """One rank's work."""
    from prism_megatron.experiments.variants import measure_variants

    measure_variants(config)


def main() -> int:
    try:
        config = parse_over(VariantsConfig(output=Path("runs/variants")), sys.argv[1:], description=__doc__ or "")
    except PrismError as error:
        return report_error(error)
    return launch(
        run,
        config,
        model_parallel_size=1,
        world_size=config.data_parallel,
        preload=(*PRELOAD, "prism_megatron.experiments.variants"),
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
