"""From a plan to rows with pixels: records are read, decoded and rendered ahead, in processes of their own.

Every rank reads what it trains on and nothing else; what it is given, and in which order, depends on the plan alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prism_megatron.config.stages.data import OnBad
from prism_megatron.data.index.samples import IndexedCorpus, Samples
from prism_megatron.data.render_conversation import ConversationRenderer
from prism_megatron.data.stream.plan import Cost, Pack, Plan, Position
from prism_megatron.data.workers import in_workers
from prism_megatron.errors import DataError
from prism_megatron.types import TokenSequence

Demonstration = tuple[TokenSequence, Sequence[float]]
"""A row and its label mask (1 on tokens to learn)."""

Item = tuple[tuple[int, int, int], ...]
"""What a worker is given: set, row of its index and expected length of each sample of a pack."""


@dataclass(frozen=True)
class LoadedPack:
    """The sequences of one row. A pack that fills up, or of which nothing could be read, has one without labels."""

    rows: tuple[Demonstration, ...]
    samples: tuple[int, ...]
    """numbers of those that were read, in the order of ``rows``; none of a pack that fills up"""
    skipped: tuple[str, ...] = ()
    """why others were not"""


@dataclass(frozen=True)
class LoadedStep:
    """One rank's packs of a step, as many as every other rank has, and where the run is after it."""

    packs: tuple[LoadedPack, ...]
    after: Position


class SampleReader:
    """Reads and renders samples; sent to every worker once."""

    def __init__(self, sets: Sequence[IndexedCorpus], render: ConversationRenderer, *, on_bad: OnBad) -> None:
        self._sets, self._render, self._on_bad = tuple(sets), render, on_bad

    def __call__(self, item: Item) -> list[Demonstration | str] | DataError:
        """A row for each sample, or why it is skipped; the error itself where that is to end the run.

        An error is returned and not raised because a raised one arrives with a worker's traceback in its message.
        """
        rows: list[Demonstration | str] = []
        for set_number, row, length in item:
            corpus, index = self._sets[set_number].corpus, self._sets[set_number].index
            where = index.where(row)
            try:
                sequence, mask = self._render(index.read(corpus, row))
                if len(sequence.token_ids) != length:
                    raise DataError(
                        f"{where}: it was indexed with {length} tokens and has {len(sequence.token_ids)}: an image has "
                        f"changed; remove {index.folder}, and the index is made again"
                    )
                rows.append((sequence, mask))
            except DataError as error:
                named = error if where in str(error) else DataError(f"{where}: {error}")
                if self._on_bad == "fail":
                    return named
                rows.append(str(named))
        return rows


class Loader:
    """A rank's share of a plan, loaded ahead by ``workers`` processes, each ``ahead`` packs (0: in this process)."""

    def __init__(
        self,
        plan: Plan,
        render: ConversationRenderer,
        *,
        cost: Cost,
        packs_per_step: int,
        dp_rank: int,
        dp_size: int,
        workers: int,
        ahead: int,
        on_bad: OnBad,
        filler_id: int,
    ) -> None:
        """``filler_id`` is the token that packs without labels hold."""
        self.plan, self._cost, self._packs_per_step = plan, cost, packs_per_step
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._workers, self._ahead = workers, ahead
        self.reader = SampleReader(plan.samples.sets, render, on_bad=on_bad)
        self._filler: Demonstration = (TokenSequence((filler_id, filler_id)), [0.0, 0.0])

    def steps(self, start: Position) -> Iterator[LoadedStep]:
        """Every step from a position to the end of the plan. Closing the iterator ends the workers.

        Raises DataError, naming file and record, for one that cannot be read and is not to be skipped; and if a worker
        is ended from outside.
        """
        waiting: list[tuple[list[Pack | None], Position]] = []

        def items() -> Iterator[Item]:
            for step in self.plan.steps(self._packs_per_step, start):
                share = step.shares(self.plan.samples, self._cost, dp_size=self._dp_size)[self._dp_rank]
                waiting.append((share, step.after))
                for pack in share:
                    if pack is not None:
                        yield _item(self.plan.samples, pack)
                yield ()  # so that a step without packs of this rank is taken from the queue in its turn

        loaded: list[LoadedPack] = []
        for rows in self._loaded(items()):
            share, after = waiting[0]
            if len(loaded) < len(share) and (pack := share[len(loaded)]) is not None:
                loaded.append(self._pack(pack, rows))
                continue
            fillers = [LoadedPack((self._filler,), ())] * (len(share) - len(loaded))
            yield LoadedStep((*loaded, *fillers), after)
            waiting.pop(0)
            loaded = []

    def _loaded(self, items: Iterator[Item]) -> Iterator[list[Demonstration | str]]:
        for found in in_workers(self.reader, items, workers=self._workers, ahead=self._ahead):
            if isinstance(found, DataError):
                raise found
            yield found

    def _pack(self, pack: Pack, rows: list[Demonstration | str]) -> LoadedPack:
        read = [(sample, row) for sample, row in zip(pack.tolist(), rows, strict=True) if not isinstance(row, str)]
        skipped = tuple(row for row in rows if isinstance(row, str))
        if not read:
            return LoadedPack((self._filler,), (), skipped)
        return LoadedPack(tuple(row for _, row in read), tuple(sample for sample, _ in read), skipped)


def _item(samples: Samples, pack: Pack) -> Item:
    columns = (samples.set_number[pack], samples.row[pack], samples.text_tokens[pack] + samples.visual_tokens[pack])
    return tuple(zip(*(column.tolist() for column in columns), strict=True))
