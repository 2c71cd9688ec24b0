"""Compares one set of responses with others: what ``prism-drift`` does."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from prism_megatron.config.tools.drift import DriftConfig, Named, place_of
from prism_megatron.disk import write_atomically, writing
from prism_megatron.evaluation.drift.compare import Plan, compare
from prism_megatron.evaluation.drift.demonstrations import read_demonstrations
from prism_megatron.evaluation.drift.embeddings import PACKAGE, read_embeddings
from prism_megatron.evaluation.drift.responses import Responses, holds_responses, read_responses
from prism_megatron.evaluation.drift.table import lines_of, plain


def measure_drift(
    config: DriftConfig, *, say: Callable[[str], object], tell: Callable[[str], object]
) -> dict[str, Any]:
    """All figures, by the name of the other set, which are said as tables and written to ``--output``.

    ``tell`` is told what concerns all of them. Raises PrismError for what cannot be read or written.
    """
    own = Named(str(config.responses), place_of(config.responses))
    first, *others = (_read(one, config) for one in (own, *config.sets))
    embed = read_embeddings(config.embeddings)
    if embed is None:
        tell(
            f"no distances of embeddings: {PACKAGE} is not installed; pip install 'prism-megatron[drift]', or name a "
            "folder by --embeddings"
        )
    plan = Plan(config.permutations, config.most, config.seed)
    figures: dict[str, Any] = {}
    for other in others:
        found = compare(first, other, embed, plan)
        figures[other.name] = plain(first, other, found)
        for line in lines_of(first, other, found):
            say(line)
    if config.output is not None:
        settings = {"responses": str(own.place), "against": {one.name: str(one.place) for one in config.sets},
                    "embeddings": None if embed is None else str(embed.source), "mode": config.mode,
                    "permutations": config.permutations, "most": config.most, "seed": config.seed}  # fmt: skip
        with writing(config.output):
            config.output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(config.output, json.dumps({"settings": settings, "against": figures}, indent=1) + "\n")
    return figures


def _read(one: Named, config: DriftConfig) -> Responses:
    if one.place.is_file() and holds_responses(one.place):
        return read_responses(one.name, one.place, mode=config.mode)
    return read_demonstrations(one.name, one.place, most=config.most, seed=config.seed)
