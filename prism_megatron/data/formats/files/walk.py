"""All records of a set in order, the bad ones as the errors that they are."""

from __future__ import annotations

from collections.abc import Iterator

from prism_megatron.data.conversation import Conversation
from prism_megatron.data.formats.files.base import Corpus, Place
from prism_megatron.errors import DataError


def walk(corpus: Corpus) -> Iterator[tuple[str, Conversation | DataError]]:
    """Every record with ``shard:number``; one record is held at a time.

    A shard that cannot be read is one error under its own name, after the records before the damage. Raises DataError
    where the set has no shards.
    """
    for shard in corpus.shards():
        places = corpus.scan(shard)
        while True:
            place = _next(places)
            if place is None:
                break
            if isinstance(place, DataError):
                yield str(shard), place
                break
            try:
                conversation = corpus.read(shard, place)
            except DataError as error:
                yield place.of(shard), error
            else:
                yield place.of(shard), conversation


def _next(places: Iterator[Place]) -> Place | DataError | None:
    try:
        return next(places, None)
    except DataError as error:
        return error
