#!/usr/bin/env python
"""Make a mini world: base, supervised policy and warm-started discriminator, through our own engine."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.config.cli import named_value, parse_over
from prism_megatron.config.experiments.mini_world import MakeMiniConfig, make_mini_recipe
from prism_megatron.engine.launch import PRELOAD, launch, report_error
from prism_megatron.errors import PrismError
from prism_megatron.terminal import guarded


def run(config: MakeMiniConfig) -> None:
    """One rank's work."""
    from prism_megatron.experiments.make_mini import make_mini

    make_mini(config)


def main() -> int:
    try:
        # A world that there is not is refused with all other flags.
        named = named_value(sys.argv[1:], "world")
        recipe = make_mini_recipe("drift" if named == "drift" else "habits")
        config = parse_over(recipe, sys.argv[1:], description=__doc__ or "")
    except PrismError as error:
        return report_error(error)
    return launch(
        run,
        config,
        model_parallel_size=1,
        world_size=config.data_parallel,
        preload=(*PRELOAD, "prism_megatron.experiments.make_mini"),
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
