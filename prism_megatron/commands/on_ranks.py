"""What the commands that work on several ranks share: from flags to processes, and in each of them a world."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from prism_megatron.config.engine.forecast import ForecastConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.validate_layout import smallest_world
from prism_megatron.engine.launch import PRELOAD, has_gpu, launch, report_error
from prism_megatron.errors import PrismError

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
    foretell: Callable[[ConfigT], bool] = lambda _config: True,
    preload: str,
    processes: Callable[[ConfigT], int] = lambda config: smallest_world(config.parallel),
) -> int:
    """Parse and check the flags in this process, then ``run`` on every rank. Returns the exit status.

    ``foretell`` says whether the run is to begin, and raises PrismError where it cannot (``wants_forecast``).
    ``preload`` names the module that ``run`` works by, which forked ranks find imported; ``processes`` says how many
    are started where torchrun has started none.
    """
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        check(config)
        begins = foretell(config)
    except PrismError as error:
        return report_error(error)
    if not begins:
        return 0
    return launch(
        run,
        config,
        model_parallel_size=config.parallel.model_parallel_size,
        world_size=processes(config),
        preload=(*PRELOAD, preload),
    )


def wants_forecast(settings: ForecastConfig) -> bool:
    """Whether this process is to say what a step needs: the first of all that torchrun started, and only if asked to.

    ``only`` is everyone's, so that no other rank begins.
    """
    if settings.forecast == "only":
        return True
    is_first = os.environ.get("RANK", "0") == "0"
    return is_first and settings.forecast == "auto" and (settings.device_gib is not None or has_gpu())


def in_world(config: ConfigT, work: Callable[[World, ConfigT], object]) -> None:
    """One rank's work in a world that is there meanwhile."""
    from prism_megatron.engine.runtime import start, stop

    world = start(config.parallel, seed=config.seed)
    work(world, config)
    stop(world)
