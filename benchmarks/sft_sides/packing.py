"""How full packed rows are, and how long a step on them takes beside one on the same records padded.

Lengths are those that the real tokenizer and image processor give; ids are folded into the small model's vocabulary,
which changes no length. Both sides learn from the same records in every step, from equal weights, and their losses are
compared. Seconds are CPU seconds of learning alone: reader processes render ahead in a run.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from prism_megatron.config.architecture.model import ALL_VISION
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.formats import FormatConfig
from prism_megatron.data.formats.detect import open_corpus
from prism_megatron.data.index.index import open_index
from prism_megatron.data.index.samples import IndexedCorpus, Samples, samples_of
from prism_megatron.data.render import Renderer
from prism_megatron.data.render_conversation import ConversationRenderer
from prism_megatron.data.stream.mixture import Mixture
from prism_megatron.data.stream.plan import START, Cost, Packing, Plan
from prism_megatron.data.stream.prefetch import Demonstration, Loader
from prism_megatron.engine.runtime import World
from prism_megatron.observability.activity import Activity
from prism_megatron.stages.sft.demonstrations import Row
from prism_megatron.stages.sft.plan import Learner
from prism_megatron.training.roles import batch_format, build_policy
from prism_megatron.training.supervised_update import learn

PADDED_ROWS = 8
FILL_LIMIT = 0.99
SPEED_LIMIT = 1.8
LOSS_LIMIT = 1e-5
"""Relative; both sides add up the same numbers in another order."""
SPECIAL_ROWS = 64
"""The last rows of the vocabulary are kept for the tokens that mean something to the model."""


@dataclass(frozen=True)
class Measured:
    """Of one budget: the rows' fill, seconds of each step on both sides, tokens that each ran, losses apart."""

    fill: float
    packed: list[float]
    padded: list[float]
    padding: float
    """padded tokens per real one"""
    apart: float

    @property
    def ratio(self) -> float:
        return statistics.median(slow / fast for slow, fast in zip(self.padded, self.packed, strict=True))


def indexed(paths: Sequence[Path], render: ConversationRenderer, index: Path) -> list[IndexedCorpus]:
    """The sets, in order, with what they hold measured. They are looked at, so those for evaluation may be too."""
    found = []
    for path in paths:
        corpus = open_corpus(path, FormatConfig(plain_answers=True), purpose="evaluate")
        opened = open_index(corpus, render, index, validation_share=0.0, on_bad="fail", workers=0, counting=Activity())
        found.append(IndexedCorpus(corpus, opened))
    return found


def planned(sets: Sequence[IndexedCorpus], budget: int) -> Plan:
    """One epoch of the records that fit the budget."""
    samples = samples_of(sets, part="train", max_tokens=budget)
    return Plan(samples, Mixture(samples, {}, seed=0), packing=Packing(budget, 1), seed=0, epochs=1)


def fill(plan: Plan) -> float:
    return plan.fill([pack for window in range(len(plan.packs_of_windows[0])) for pack in plan.packs(0, window)])


def measure(
    plan: Plan,
    render: ConversationRenderer,
    renderer: Renderer,
    *,
    budget: int,
    model: Path,
    world: World,
    packs: int,
    steps: int,
) -> Measured:
    """Train both sides for some steps of so many packs, in turns; a first step warms up and is not counted."""
    shape = Qwen3VLShape.from_folder(model)
    packing, padding = (_learner(model, shape, world, row_tokens=tokens) for tokens in (budget, None))
    loader = Loader(
        plan, render, cost=Cost(1.0, 0.0, 0.0), packs_per_step=packs, dp_rank=0, dp_size=1, workers=0, ahead=0,
        on_bad="fail", filler_id=renderer.pad_token_id,
    )  # fmt: skip
    seconds: dict[bool, list[float]] = {True: [], False: []}
    apart, real, run = 0.0, 0, 0
    for number, step in enumerate(islice(loader.steps(START), steps + 1)):
        rows = [tuple(_folded(one, renderer, shape) for one in pack.rows) for pack in step.packs]
        records = [one for row in rows for one in row]
        # As they come without packing: in no order.
        records = [records[place] for place in np.random.default_rng(number).permutation(len(records))]
        losses = []
        for is_packed, learner, parts in ((True, packing, rows), (False, padding, [(one,) for one in records])):
            begin = time.process_time()
            batches = learner.batches([Row(part, (0,) * len(part)) for part in parts])
            losses.append(learn(learner.policy, batches, world=world).loss)
            seconds[is_packed].append(time.process_time() - begin)
            if not is_packed:
                run += sum(batch.input_ids_B_S.numel() for batch in batches)
        real += sum(len(sequence.token_ids) for sequence, _ in records)
        apart = max(apart, abs(losses[0] - losses[1]) / losses[0])
    return Measured(fill(plan), seconds[True][1:], seconds[False][1:], run / real, apart)


def _learner(model: Path, shape: Qwen3VLShape, world: World, *, row_tokens: int | None) -> Learner:
    """Of a policy whose vision tower and projector are frozen, as the stage's own default has it."""
    small = Renderer.from_folder(model)
    policy = build_policy(
        model, shape, world=world, dtype=torch.float32, optimizer=OptimizerConfig(lr=1e-4), total_steps=1000,
        freeze=ALL_VISION,
    )  # fmt: skip
    return Learner(
        policy, batch_format(small, world), row_tokens=row_tokens,
        rows_per_microbatch=1 if row_tokens else PADDED_ROWS, eval_every=0, save_every=1, eval_rows=1,
    )  # fmt: skip


def _folded(one: Demonstration, renderer: Renderer, shape: Qwen3VLShape) -> Demonstration:
    sequence, mask = one
    rows = shape.text.vocab - SPECIAL_ROWS
    ids = tuple(shape.image_token_id if i == renderer.image_token_id else i % rows for i in sequence.token_ids)
    return dataclasses.replace(sequence, token_ids=ids), mask


def described(samples: Samples) -> str:
    tokens = samples.tokens
    return (
        f"{len(tokens):,} records of {tokens.mean():.0f} tokens (median {np.median(tokens):.0f}, most {tokens.max()})"
    )
