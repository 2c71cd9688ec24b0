"""What the commands that work on several ranks share: from flags to processes, and in each of them a world."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from prism_megatron.commands.starting.first_rank import FirstRank
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.validate_layout import smallest_world
from prism_megatron.engine.launch import PRELOAD, launch, report_error
from prism_megatron.errors import PrismError
from prism_megatron.observability import start_up

if TYPE_CHECKING:
    from prism_megatron.engine.runtime import World


class OnRanks(Protocol):
    """A command's configuration: how ranks share the model, and what draws are keyed by."""

    @property
    def parallel(self) -> ParallelConfig: ...

    @property
    def seed(self) -> int: ...


ConfigT = TypeVar("ConfigT", bound=OnRanks)


def main_on_ranks(
    argv: Sequence[str] | None,
    *,
    parse: Callable[[Sequence[str]], ConfigT],
    check: Callable[[ConfigT], None],
    run: Callable[[ConfigT], None],
    foretell: Callable[[ConfigT, FirstRank], ConfigT | None] = lambda config, _first: config,
    preload: str,
    processes: Callable[[ConfigT], int] = lambda config: smallest_world(config.parallel),
) -> int:
    """Parse and check the flags in this process, then ``run`` on every rank. Returns the exit status.

    ``foretell`` returns the configuration to begin with, the same on every rank, or None where the run is not to begin;
    it raises PrismError where it cannot (``foretold``).
    ``preload`` names the module that ``run`` works by, which forked ranks find imported; ``processes`` says how many
    are started where torchrun has started none.
    """
    start_up.begin()
    with FirstRank() as first:
        try:
            asked = parse(sys.argv[1:] if argv is None else argv)
            check(asked)
            start_up.mark("flags")
            config = foretell(asked, first)
            start_up.mark("forecast")
        except PrismError as error:
            return report_error(error)
        if config is None:
            return 0
        return launch(
            run,
            config,
            model_parallel_size=config.parallel.model_parallel_size,
            world_size=processes(config),
            preload=(*PRELOAD, preload),
        )


def in_world(config: ConfigT, work: Callable[[World, ConfigT], object]) -> None:
    """One rank's work in a world that is there meanwhile."""
    from prism_megatron.engine.runtime import start, stop

    start_up.mark("ranks")
    world = start(config.parallel, seed=config.seed)
    start_up.mark("groups")
    work(world, config)
    stop(world)
