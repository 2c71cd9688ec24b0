#!/usr/bin/env python
"""Measure what alignment changes on held-out scenes, beside three controls (``make effect``)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.config.cli import parse_over
from prism_megatron.config.experiments.effect import EffectConfig
from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.stages.arm import effect_arms
from prism_megatron.engine.launch import PRELOAD, launch, report_error
from prism_megatron.errors import PrismError
from prism_megatron.terminal import guarded


def run(config: EffectConfig) -> None:
    """One rank's work."""
    from prism_megatron.experiments.effect import measure_effect

    measure_effect(config, effect_arms(MINI_ALIGN))


def main() -> int:
    try:
        config = parse_over(EffectConfig(output=Path("runs/effect")), sys.argv[1:], description=__doc__ or "")
    except PrismError as error:
        return report_error(error)
    return launch(
        run,
        config,
        model_parallel_size=1,
        world_size=config.data_parallel,
        preload=(*PRELOAD, "prism_megatron.experiments.effect"),
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
