"""A set of demonstrations as responses: what the last turn of each says."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prism_megatron.config.formats import FormatConfig
from prism_megatron.data.formats.detect import format_of, open_corpus
from prism_megatron.errors import DataError
from prism_megatron.evaluation.drift.responses import Responses, segments_of


def read_demonstrations(name: str, path: Path, *, most: int, seed: int) -> Responses:
    """At most ``most`` of the set's, which may be large: so many are drawn before any is read.

    Raises DataError, naming the record, for a malformed one, and for a set in a format that cannot be told.
    """
    try:
        told = format_of(path)
    except DataError as error:
        raise DataError(
            f"{path} holds neither responses (JSON lines with id and response) nor demonstrations whose format can be "
            "told (docs/data.md)"
        ) from error
    corpus = open_corpus(path, FormatConfig(told), purpose="evaluate")
    places = [(shard, place) for shard in corpus.shards() for place in corpus.scan(shard)]
    drawn = np.sort(np.random.default_rng(seed).permutation(len(places))[:most])
    texts: dict[str, dict[str, str]] = {}
    for number in drawn:
        shard, place = places[number]
        conversation = corpus.read(shard, place)
        said = "".join(part for part in conversation.turns[-1].parts if isinstance(part, str))
        texts.setdefault(conversation.id, segments_of(said))
    if not texts:
        raise DataError(f"{path} holds no demonstrations")
    not_in_form = sum("caption" not in parts for parts in texts.values())
    return Responses(name, texts, not_in_form, left_out=len(places) - len(texts))
