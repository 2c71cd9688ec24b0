#!/usr/bin/env python
"""Does alignment help, and more than its controls? All arms of a registration on its seeds (``make effect``)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prism_megatron.config.cli import parse_over
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.experiments.effect import EffectConfig, Registration, read_registration
from prism_megatron.engine.launch import die_with_parent, launch, quiet_vendors, report_error
from prism_megatron.errors import ConfigError, PrismError
from prism_megatron.terminal import guarded


def run(config: EffectConfig) -> None:
    """One seed, in a world of one rank."""
    from prism_megatron.engine.runtime import start, stop
    from prism_megatron.experiments.effect.run import commit_here
    from prism_megatron.experiments.effect.seed import Seed

    assert config.seed is not None
    world = start(ParallelConfig(), seed=config.seed)
    Seed(read_registration(config.registration), config.seed, config.output, world, commit_here()).run()
    stop(world)


def main() -> int:
    try:
        config = parse_over(EffectConfig(), sys.argv[1:], description=__doc__ or "")
        registered = read_registration(config.registration)
        if config.seed is not None and config.seed not in registered.seeds:
            raise ConfigError(f"--seed {config.seed} is none of the registration's: {registered.seeds}")
        return measure(config, registered)
    except PrismError as error:
        return report_error(error)


def measure(config: EffectConfig, registered: Registration) -> int:
    """One seed in this process, or all of them and their table; the exit status. Raises PrismError."""
    quiet_vendors()
    from prism_megatron.evaluation.drift.embeddings import read_embeddings
    from prism_megatron.experiments.effect.run import PARENT, command_of, run_seeds, settle, write_result

    settle(config.output, registered)
    if config.seed is not None:
        if PARENT in os.environ:
            die_with_parent(int(os.environ[PARENT]))
        return launch(run, config, model_parallel_size=1, world_size=1)
    embed = read_embeddings(config.embeddings)
    run_seeds(config, registered, command_of(config, Path(__file__).resolve()))
    print(write_result(config.output, registered, embed, workers=config.workers), flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(guarded(main))
