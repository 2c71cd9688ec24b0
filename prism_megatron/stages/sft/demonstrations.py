"""What supervised fine-tuning learns from, step by step: records by a plan, or scenes that are made as needed."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prism_megatron.data.identity import Identity
from prism_megatron.data.loader import Example, SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.stream.plan import START, Plan, Position
from prism_megatron.data.stream.prefetch import Demonstration, Loader
from prism_megatron.run.stage import Plain

SCENES_PER_ROW = 4


@dataclass(frozen=True)
class Row:
    """Conversations that lie in one row; ``sources`` says where each comes from, by number."""

    demonstrations: tuple[Demonstration, ...]
    sources: tuple[int, ...]
    fills: bool = False
    """stands for a row that is not there: without labels, and counted nowhere"""


@dataclass(frozen=True)
class StepRows:
    """One rank's rows of a step, as many as every other rank has; filling rows have no labels."""

    rows: tuple[Row, ...]
    samples: int
    skipped: tuple[str, ...]
    """why samples of this rank could not be read"""
    after: Plain
    """where the data are after it"""


class Demonstrations(Protocol):
    """Anything that supervised fine-tuning can learn from. Rows are this rank's, all else is the same on every rank."""

    sources: Sequence[str]
    num_steps: int | None
    """None where there is no end"""

    @property
    def identity(self) -> Identity: ...
    @property
    def counts(self) -> Mapping[str, int]:
        """As ``Stage.data_counts``."""

    def steps(self, after: Plain) -> Generator[StepRows]:
        """All steps from a place on; ``{}`` is the beginning."""


class RecordDemonstrations:
    """Records, in the order of a plan."""

    def __init__(self, plan: Plan, loader: Loader, *, rows_per_step: int) -> None:
        self._loader, self._plan = loader, plan
        samples = plan.samples
        self.sources: Sequence[str] = samples.sources
        self.num_steps: int | None = plan.num_steps(rows_per_step)
        self._rows_per_step = rows_per_step
        counts = samples.counts
        self.counts: Mapping[str, int] = {
            "lines": counts.kept + counts.bad + counts.other_part + counts.too_long,
            "kept": counts.kept,
            "bad": counts.bad,
            "held_out": counts.other_part,
            "too_long": counts.too_long,
        }

    @property
    def identity(self) -> Identity:
        plan = self._plan.identity
        return {"flag": "data", "count": plan["samples"], "digest": plan["digest"], "batch_size": self._rows_per_step}

    def steps(self, after: Plain) -> Generator[StepRows]:
        source = self._plan.samples.source
        start = Position(**after) if after else START
        for step in self._loader.steps(start):
            rows = tuple(
                Row(pack.rows, tuple(source[list(pack.samples)].tolist()) if pack.samples else (0,), not pack.samples)
                for pack in step.packs
            )
            skipped = tuple(reason for pack in step.packs for reason in pack.skipped)
            yield StepRows(rows, sum(len(pack.samples) for pack in step.packs), skipped, step.after._asdict())


class SceneDemonstrations:
    """Scenes of the mini world as its teacher writes about them; none is shown twice."""

    sources: Sequence[str] = ("scenes",)
    num_steps: int | None = None
    counts: Mapping[str, int] = {}

    def __init__(
        self, scenes: SceneSource, renderer: Renderer, *, rows_per_step: int, per_row: int, dp_rank: int, dp_size: int
    ) -> None:
        self._scenes, self._renderer = scenes, renderer
        self._rows_per_step, self._per_row = rows_per_step, per_row
        self._dp_rank, self._dp_size = dp_rank, dp_size

    @property
    def identity(self) -> Identity:
        return self._scenes.identity

    def steps(self, after: Plain) -> Generator[StepRows]:
        share = self._rows_per_step // self._dp_size
        step = int(after.get("step", 0))
        while True:
            first = (step * self._rows_per_step + self._dp_rank * share) * self._per_row
            rows = tuple(self._row(first + row * self._per_row) for row in range(share))
            step += 1
            yield StepRows(rows, share * self._per_row, (), {"step": step})

    def _row(self, first: int) -> Row:
        examples = [self._scenes.example(first + number) for number in range(self._per_row)]
        return Row(tuple(map(self._demonstration, examples)), (0,) * len(examples))

    def _demonstration(self, example: Example) -> Demonstration:
        return self._renderer.training_row(example.prompt, example.reference)


def only(demonstrations: Demonstrations, rows: int, *, dp_size: int) -> tuple[list[Row], list[str]]:
    """This rank's first rows of demonstrations to ask: ``rows`` over all ranks, rounded up to whole steps.

    Also why samples of them could not be read.
    """
    found: list[Row] = []
    skipped: list[str] = []
    for step in demonstrations.steps({}):
        found += step.rows
        skipped += step.skipped
        if len(found) * dp_size >= rows:
            break
    return found, skipped
