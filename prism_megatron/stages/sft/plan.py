"""Who learns, how rows become micro-batches, and when the held-out part is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from prism_megatron.config.engine.vision_cache import VisionCacheConfig
from prism_megatron.engine.batch import Batch, Extra
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.stages.sft.demonstrations import Demonstrations, Row, only
from prism_megatron.stages.sft.drift import Drift
from prism_megatron.stages.sft.throughput import Throughput
from prism_megatron.training.batches import BatchFormat, supervised_batch
from prism_megatron.training.frozen_vision import use_vision_cache
from prism_megatron.types import TokenSequence


@dataclass(frozen=True)
class Lessons:
    """What is learned from, and what shows what was learned."""

    learned: Demonstrations
    held_out: Demonstrations | None
    """whose loss is measured now and then; None where nothing is held out"""
    drift: Drift | None
    """held-out scenes that are answered before and after; None where there are none"""
    steps: int
    """optimizer steps in all"""


@dataclass(eq=False)
class Learner:
    """The policy and what stays fixed of its steps."""

    policy: MegatronEngine
    form: BatchFormat
    row_tokens: int | None
    """what a packed row may hold; None for one conversation to a row"""
    rows_per_microbatch: int
    eval_every: int
    """steps between losses on the held-out part, which every checkpoint has too; 0 for the last step alone"""
    save_every: int
    """steps between checkpoints"""
    eval_rows: int
    """rows of it over all data-parallel ranks"""
    seconds: float = 0.0
    """that the last step took"""
    throughput: Throughput | None = None
    """None where the device's peak is not known"""
    vision_cache: VisionCacheConfig = field(default_factory=VisionCacheConfig)

    def begin(self) -> None:
        """Before the first step, with the weights that the run begins or goes on with."""
        use_vision_cache(self.policy, self.vision_cache)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step's data and its update."""
        began = time.perf_counter()
        yield
        self.seconds = time.perf_counter() - began

    def batches(self, rows: Sequence[Row]) -> list[Batch]:
        """Micro-batches, in whole rounds; rows without labels fill the last one up."""
        size, world = self.rows_per_microbatch, self.policy.world
        filled = [*rows, *[self._filler()] * (-len(rows) % (size * world.microbatch_rounds))]
        return [self._batch(filled[first : first + size]) for first in range(0, len(filled), size)]

    def asked(self, held_out: Demonstrations, *, say: Callable[[str], None]) -> list[Batch]:
        """The micro-batches of the held-out part that this rank is asked; ``say`` hears what could not be read."""
        rows, skipped = only(held_out, self.eval_rows, dp_size=self.policy.world.dp_size)
        for reason in skipped:
            say(f"held out, but not asked: {reason}")
        return self.batches(rows)

    def asks_after(self, step: int, total_steps: int) -> bool:
        """Whether the held-out part is asked after this step; always after the last."""
        done = step + 1
        return done == total_steps or (self.eval_every > 0 and (done % self.eval_every == 0 or self._saves(done)))

    def may_be_best(self, step: int, total_steps: int) -> bool:
        """Whether there will be a checkpoint of this step, so that it can be the one that is kept for its loss."""
        return step + 1 == total_steps or self._saves(step + 1)

    def _saves(self, done: int) -> bool:
        return done % self.save_every == 0

    def _batch(self, rows: Sequence[Row]) -> Batch:
        made = [(one, source) for row in rows for one, source in zip(row.demonstrations, row.sources, strict=True)]
        return supervised_batch(
            [sequence for (sequence, _), _ in made],
            [mask for (_, mask), _ in made],
            form=self.form,
            extras={Extra.SOURCE: [[float(source)] * len(mask) for (_, mask), source in made]},
            pack=self.row_tokens is not None,
        )

    def _filler(self) -> Row:
        pad = self.form.pad_token_id
        return Row(((TokenSequence((pad, pad)), [0.0, 0.0]),), (0,), fills=True)
