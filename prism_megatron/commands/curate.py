"""Make demonstrations of problems by a teacher behind an endpoint: ``prism-curate --config RECIPE --output FOLDER``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prism_megatron.config.cli import parse_flags
from prism_megatron.config.tools.curate import CurateConfig, Recipe, check_curate, read_recipe
from prism_megatron.engine.launch import report_error
from prism_megatron.errors import ConfigError, PrismError, RunStopped

if TYPE_CHECKING:
    from prism_megatron.curation.calls import Asker
    from prism_megatron.curation.steps import Parts
    from prism_megatron.run.ending.stopping import Stopping


def parse(argv: Sequence[str]) -> tuple[CurateConfig, Recipe]:
    """The flags and the recipe. Raises ConfigError for what cannot work."""
    config = parse_flags(CurateConfig(), argv, description=CurateConfig.__doc__ or "")
    if config.config is None:
        raise ConfigError("name the recipe: --config FILE, a YAML file (docs/curation.md, examples/curation)")
    recipe = read_recipe(config.config)
    check_curate(config, recipe, os.environ)
    return config, recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 3 where a signal, or what was spent, ended it."""
    try:
        config, recipe = parse(sys.argv[1:] if argv is None else argv)
        from prism_megatron.curation.run import curate
        from prism_megatron.run.ending.stopping import Stopping

        with Stopping() as stopping:
            curate(config, recipe, partial(_parts, config, recipe, stopping), say=_say)
    except PrismError as error:
        return report_error(error)
    return 0


def _parts(config: CurateConfig, recipe: Recipe, stopping: Stopping, folder: Path) -> Parts:
    """What the steps work with: endpoints by the store, and the search for duplicates."""
    from prism_megatron.curation.duplicates.step import deduplicate
    from prism_megatron.curation.identity import STORE
    from prism_megatron.curation.steps import Parts

    def check_going_on() -> None:
        if (wish := stopping.wish) is not None:
            raise RunStopped(f"stopped by {wish}")

    return Parts(
        deduplicate=partial(deduplicate, rules=recipe.duplicates, workers=config.workers, folder=folder, say=_say),
        endpoints=partial(_endpoints, config, recipe, config.store or folder / STORE),
        say=_say,
        check_going_on=check_going_on,
    )


@contextmanager
def _endpoints(config: CurateConfig, recipe: Recipe, store: Path) -> Iterator[Asker]:
    from prism_megatron.curation.client.caller import Caller
    from prism_megatron.curation.storage.store import Store

    with (
        closing(Store(store)) as opened,
        closing(Caller(opened, recipe.models, seed=recipe.seed, max_cost=config.max_cost)) as caller,
    ):
        yield caller


def _say(text: str) -> None:
    print(text, flush=True)
