"""Does fine-tuning on records learn from their images? The same run with blank ones, and a table of token counts.

Four predictors of the same held-out answers: the mini fine-tuned with the images; that policy asked with blank ones,
which says whether it relies on what it sees; the same run with blank images from the first step, which says whether
seeing helped; and the frequencies of tokens in the answers learned from (unigram, one added to each count). Figures are
nats a label token, with 95 % bootstrap intervals over records.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from prism_megatron.config.experiments.image_use import ImageUseConfig, run_of
from prism_megatron.data.pictures.images import blanked
from prism_megatron.data.tokenizer import MODEL_VOCAB_SIZE
from prism_megatron.disk import write_atomically
from prism_megatron.engine.runtime import start, stop
from prism_megatron.evaluation.bootstrap import Interval, statistic_interval
from prism_megatron.parallel.collectives import all_gather_objects
from prism_megatron.run.session import Session
from prism_megatron.run.stage import Plain
from prism_megatron.stages.sft.build import build
from prism_megatron.stages.sft.demonstrations import Demonstrations, Row, StepRows
from prism_megatron.stages.sft.plan import Lessons
from prism_megatron.stages.sft.stage import SFT
from prism_megatron.training.supervised_update import measure

T = TypeVar("T")
Array = npt.NDArray[np.float64]
IMAGES, BLANK, UNIGRAM = "images", "blank images", "unigram"
ASKED_BLANK = "images, asked with blank ones"


class BlankImages:
    """Demonstrations whose images are of one colour, the middle one (pixels of 0 after normalisation)."""

    def __init__(self, seen: Demonstrations) -> None:
        self._seen = seen
        self.sources, self.num_steps = seen.sources, seen.num_steps
        self.identity, self.counts = seen.identity, seen.counts

    def steps(self, after: Plain) -> Generator[StepRows]:
        """As those that are seen."""
        for step in self._seen.steps(after):
            yield replace(step, rows=tuple(map(_blank, step.rows)))


def _blank(row: Row) -> Row:
    return replace(
        row,
        demonstrations=tuple(
            (
                replace(sequence, images=tuple(map(blanked, sequence.images))),
                mask,
            )
            for sequence, mask in row.demonstrations
        ),
    )


@dataclass(frozen=True, eq=False)
class Losses:
    """Of each held-out record: negative log-likelihood of its label tokens, nats, and their number."""

    nll_R: Array
    tokens_R: Array
    set_R: npt.NDArray[np.str_]
    """the set that it is of: the first part of its source"""

    def of(self, name: str) -> Losses:
        """Those of one set."""
        here = self.set_R == name
        return Losses(self.nll_R[here], self.tokens_R[here], self.set_R[here])


def measure_image_use(config: ImageUseConfig) -> None:
    """Train both arms in one world and write ``image_use.json`` and ``image_use.md`` under ``config.output``."""
    stage_config = run_of(config)
    world = start(stage_config.parallel, seed=stage_config.seed)
    losses: dict[str, Losses] = {}
    by_epoch: dict[str, list[Losses]] = {IMAGES: [], BLANK: []}
    label_tokens = 0
    for arm, asked in by_epoch.items():
        with closing(build(stage_config, Session(world, Path(), quiet=True))) as stage:
            if arm == BLANK:
                stage.lessons = with_blank_images(stage.lessons)
            stage.prepare(0)
            for step in range(stage.total_steps):
                stage.play(step)
                label_tokens += stage.last.update.label_tokens if arm == IMAGES and stage.last is not None else 0
                if (step + 1) * config.epochs // stage.total_steps > len(asked):
                    asked.append(held_out_losses(stage))
                    if world.is_main:
                        print(f"{arm}: epoch {len(asked)}: {mean_loss(asked[-1]).mean:.3f}", flush=True)
            losses[arm] = asked[-1]
            if arm == IMAGES:
                losses[UNIGRAM] = unigram_losses(stage)
                stage.lessons = with_blank_images(stage.lessons)
                losses[ASKED_BLANK] = held_out_losses(stage)
    if world.is_main:
        _write(config, losses, by_epoch, label_tokens=label_tokens)
    stop(world)


def with_blank_images(lessons: Lessons) -> Lessons:
    """The same, learned and held out, of which nothing can be seen."""
    assert lessons.held_out is not None, "a share above zero was held out"
    return replace(lessons, learned=BlankImages(lessons.learned), held_out=BlankImages(lessons.held_out))


def held_out_losses(stage: SFT) -> Losses:
    """The policy's, of all held-out records; equal on every rank."""
    world, rows = stage.session.world, _held_out_rows(stage)
    # Every record is a source of its own: its number here, between those of the other data-parallel ranks.
    first, numbered = 0, []
    for row in rows:
        own = range(first, first + len(row.demonstrations))
        numbered.append(replace(row, sources=tuple(one * world.dp_size + world.dp_rank for one in own)))
        first = own.stop
    names = [str(one) for one in range(max(all_gather_objects(first)) * world.dp_size)]
    found = measure(stage.learner.policy, stage.learner.batches(numbered), names, world=world)
    return _losses([found[name] for name in names], _interleaved(_sets_of(stage, rows)))


def unigram_losses(stage: SFT) -> Losses:
    """Those of the frequencies, with one added to each count, of the tokens that an epoch teaches; equal everywhere."""
    world, steps = stage.session.world, stage.lessons.learned.steps({})
    own = np.ones(MODEL_VOCAB_SIZE) / world.dp_size
    for taken in islice(steps, stage.total_steps):
        for tokens in _labels(taken.rows):
            np.add.at(own, tokens, 1.0)
    steps.close()
    counts = np.sum(all_gather_objects(own), axis=0)
    nll_V, rows = np.log(counts.sum()) - np.log(counts), _held_out_rows(stage)
    mine = [(float(nll_V[tokens].mean()) if tokens else 0.0, len(tokens)) for tokens in _labels(rows)]
    found = [(0.0, 0) if one is None else one for one in _interleaved(mine)]
    return _losses(found, _interleaved(_sets_of(stage, rows)))


def _interleaved(own: Sequence[T]) -> list[T | None]:
    """Every rank's first, then every rank's second, …; None fills a share up to the longest."""
    shares = all_gather_objects(list(own))
    longest = max(map(len, shares))
    return [share[number] if number < len(share) else None for number in range(longest) for share in shares]


def _held_out_rows(stage: SFT) -> list[Row]:
    assert stage.lessons.held_out is not None, "a share above zero was held out"
    return [row for step in stage.lessons.held_out.steps({}) for row in step.rows]


def _sets_of(stage: SFT, rows: Sequence[Row]) -> list[str]:
    """The set of each record, which is the first part of its source."""
    return [stage.sources[source].partition("/")[0] for row in rows for source in row.sources]


def _labels(rows: Sequence[Row]) -> Iterator[list[int]]:
    """The label tokens of each demonstration."""
    for row in rows:
        for sequence, mask in row.demonstrations:
            yield [token for token, learned in zip(sequence.token_ids, mask, strict=True) if learned]


def _losses(found: Sequence[tuple[float, int]], sets: Sequence[str | None]) -> Losses:
    """Of means and numbers of label tokens; entries without a token fill up a rank's share."""
    mean_R, tokens_R = np.array(found, dtype=np.float64).T
    asked = tokens_R > 0
    return Losses((mean_R * tokens_R)[asked], tokens_R[asked], np.array([str(one) for one in sets])[asked])


def mean_loss(losses: Losses) -> Interval:
    """Nats a label token over all records."""
    return _ratio(losses.nll_R, losses.tokens_R)


def difference(losses: Losses, other: Losses) -> Interval:
    """Nats a label token by which ``losses`` are above those of ``other``, of the same records."""
    return _ratio(losses.nll_R - other.nll_R, losses.tokens_R)


def _ratio(nll_R: Array, tokens_R: Array) -> Interval:
    pairs = [(float(nll), float(tokens)) for nll, tokens in zip(nll_R, tokens_R, strict=True)]
    return statistic_interval(pairs, lambda flat: float(flat[0::2].sum() / flat[1::2].sum()), seed=0)


def _write(
    config: ImageUseConfig, losses: dict[str, Losses], by_epoch: dict[str, list[Losses]], *, label_tokens: int
) -> None:
    records = losses[IMAGES]
    result: dict[str, object] = {"label_tokens": label_tokens, "epochs": config.epochs, "freeze": config.freeze}
    lines = [
        f"{len(records.tokens_R)} held-out records, {records.tokens_R.sum():,.0f} label tokens.",
        f"Learned from {label_tokens:,} label tokens in {config.epochs} epochs; frozen: {', '.join(config.freeze)}.",
        "Nats a label token; mean and 95 % bootstrap interval over records.",
        "",
        "| records | predictor | loss | above the run with images by |",
        "|---|---|---|---|",
    ]
    parts = {"all": losses} | {
        name: {arm: own.of(name) for arm, own in losses.items()} for name in sorted(set(records.set_R.tolist()))
    }
    for part, by_arm in parts.items():
        for arm, own in by_arm.items():
            mean, above = mean_loss(own), difference(own, by_arm[IMAGES])
            result[f"{part}/{arm}"] = {"loss": mean, "above_images": above}
            apart = "" if arm == IMAGES else f"{above.mean:.3f} [{above.low:.3f}, {above.high:.3f}]"
            lines.append(f"| {part} | {arm} | {mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}] | {apart} |")
    lines += ["", "| epoch | images | blank images | above the run with images by |", "|---|---|---|---|"]
    for epoch, (seen, blank) in enumerate(zip(by_epoch[IMAGES], by_epoch[BLANK], strict=True), start=1):
        above = difference(blank, seen)
        result[f"epoch {epoch}"] = {IMAGES: mean_loss(seen), BLANK: mean_loss(blank), "above_images": above}
        lines.append(
            f"| {epoch} | {mean_loss(seen).mean:.3f} | {mean_loss(blank).mean:.3f} | "
            f"{above.mean:.3f} [{above.low:.3f}, {above.high:.3f}] |"
        )
    config.output.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output / "image_use.json", json.dumps(result, indent=2) + "\n")
    write_atomically(config.output / "image_use.md", "\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
