"""A whole curation in its folder: claimed, checked against what was begun, played and reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prism_megatron.config.tools.curate import CurateConfig, Recipe
from prism_megatron.curation.identity import check_output, identity_of, settle
from prism_megatron.curation.page import PAGE, write_report
from prism_megatron.curation.report import findings_of, lines_of
from prism_megatron.curation.steps import Curation, Parts
from prism_megatron.disk import writing
from prism_megatron.errors import PrismError, RunStopped
from prism_megatron.run.alone import alone_in, remove_unused
from prism_megatron.run.folder import folder_of_new_run


def curate(
    config: CurateConfig, recipe: Recipe, parts_of: Callable[[Path], Parts], *, say: Callable[[str], object]
) -> Path:
    """Play all that is not done, and return the folder. ``parts_of`` makes the parts for it.

    Raises PrismError; RunStopped where the command was asked to end.
    """
    check_output(config.output)
    with writing(config.output or Path("runs")):
        folder = folder_of_new_run("curate") if config.output is None else config.output
    is_new = not folder.exists() or config.output is None
    with alone_in(folder, command="prism-curate"):
        try:
            parts = parts_of(folder)
            curation = Curation(config, recipe, folder, parts)
            # All data are read before anything is asked: what is malformed, or for evaluation only, ends it here.
            data = curation.pool.digest()
            evaluation = curation.evaluation.digest() if recipe.evaluation else ""
            settle(folder, identity_of(config, recipe, data=data, evaluation=evaluation))
        except PrismError:
            if is_new:
                remove_unused(folder)
            raise
        say(f"folder {folder}")
        try:
            curation.play()
        except RunStopped as stopped:
            raise RunStopped(f"{stopped}; the same command with --output {folder} goes on") from stopped
        summary = write_report(folder, findings_of(folder, shown=config.shown))
        for line in lines_of(summary):
            say(line)
        say(f"wrote {folder / PAGE}")
    return folder
