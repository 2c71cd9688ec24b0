"""What one step of supervised fine-tuning reports, as one flat row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prism_megatron.data.render import Renderer
from prism_megatron.engine.runtime import World
from prism_megatron.engine.vision.cache import VisionCache
from prism_megatron.evaluation.health import Figures
from prism_megatron.evaluation.sample import MAX_SAMPLES, Sample, png_url
from prism_megatron.parallel.collectives import sum_numbers
from prism_megatron.stages.sft.demonstrations import Row, StepRows
from prism_megatron.stages.sft.plan import Learner
from prism_megatron.training.figures import NOT_FINITE, update_row
from prism_megatron.training.supervised_update import SFTUpdate

NO_LABELS = "no row of the step has a token to learn"


@dataclass(frozen=True)
class SFTStep:
    """Everything one step produced; observers read it and change nothing."""

    step: int
    rows: StepRows
    update: SFTUpdate
    held_out: Mapping[str, tuple[float, int]] | None
    """loss and label tokens of each source, where they were asked"""


def step_row(step: SFTStep, *, learner: Learner, world: World) -> Figures:
    """Figures of the whole step, equal on every rank."""
    rows = [row for row in step.rows.rows if not row.fills]
    sequences = [sequence for row in rows for sequence, _ in row.demonstrations]
    own = {
        "samples": step.rows.samples,
        "skipped_samples": len(step.rows.skipped),
        "tokens": sum(len(sequence.token_ids) for sequence in sequences),
        "images": sum(len(sequence.images) for sequence in sequences),
        "rows": len(step.rows.rows),
    }
    counts = {name: int(count) for name, count in sum_numbers(own, device=world.device, group=world.groups.dp).items()}
    room = counts.pop("rows") * (learner.row_tokens or 0)
    row: Figures = {
        "step": step.step,
        **counts,
        "label_tokens": step.update.label_tokens,
        "loss": step.update.loss if step.update.label_tokens else None,
        "row_fill": counts["tokens"] / room if room else None,
    }
    row |= update_row("policy", step.update.result)
    row |= step.update.experts
    cached = cache_row(learner.policy.vision_cache, world=world)
    row |= cached
    if learner.throughput is not None:
        row |= learner.throughput.row(rows, learner.seconds, found=found_share(cached), world=world)
    return row if step.held_out is None else row | held_out_row(step.held_out)


def cache_row(cache: VisionCache | None, *, world: World) -> Figures:
    """What a cache of features was asked since the last row, and had; nothing without one."""
    if cache is None:
        return {}
    counts = cache.take_counts()
    own = {
        "vision_cache/images": counts.images,
        "vision_cache/found": counts.found,
        "vision_cache/too_large": counts.too_large,
        "vision_cache/ranks_not_writing": int(cache.failure is not None),
    }
    return {name: int(count) for name, count in sum_numbers(own, device=world.device).items()}


def found_share(cached: Figures) -> float:
    """Of a step's images, how many the cache had, by its :func:`cache_row`."""
    images, found = cached.get("vision_cache/images"), cached.get("vision_cache/found")
    return found / images if images and found else 0.0


def held_out_row(held_out: Mapping[str, tuple[float, int]]) -> Figures:
    """Losses of the held-out part: of all tokens together, and of each source."""
    tokens = sum(count for _, count in held_out.values())
    total = sum(loss * count for loss, count in held_out.values())
    row: Figures = {"held_out/tokens": tokens, "held_out/loss": total / tokens if tokens else None}
    for name, (loss, count) in held_out.items():
        row |= {f"held_out/{name}/loss": loss if count else None, f"held_out/{name}/tokens": count}
    return row


@dataclass(frozen=True)
class Best:
    """The lowest held-out loss so far, and of what: other held-out tokens have another loss."""

    loss: float
    tokens: int
    digest: str
    """of the held-out part"""


def best_of(best: Best | None, row: Figures, *, digest: str) -> tuple[Best | None, bool]:
    """The lowest held-out loss with this step's, and whether that is it; a step that was not asked is not.

    The first one that was asked otherwise than ``best``, after a resume with another held-out part, is the best anew.
    """
    loss, tokens = row.get("held_out/loss"), row.get("held_out/tokens")
    if not isinstance(loss, float) or not isinstance(tokens, int):
        return best, False
    now = Best(loss, tokens, digest)
    same = best is not None and (best.tokens, best.digest) == (tokens, digest)
    if best is not None and same and loss >= best.loss:
        return best, False
    return now, True


def why_idle(update: SFTUpdate) -> dict[str, str]:
    """Why the step did not change the policy; empty where it did."""
    if not update.label_tokens:
        return {"policy": NO_LABELS}
    return {} if update.result.updated else {"policy": NOT_FINITE}


def shown(rows: Sequence[Row], renderer: Renderer) -> list[Sample]:
    """The first demonstrations of a step: what was there, and below it what was learned of it."""
    samples = []
    for sequence, mask in [one for row in rows for one in row.demonstrations][:MAX_SAMPLES]:
        tokens = list(zip(sequence.token_ids, mask, strict=True))
        asked = [token for token, learned in tokens if not learned and token != renderer.image_token_id]
        samples.append(
            Sample(
                images=[png_url(renderer.preprocessor.picture(image)) for image in sequence.images],
                prompt=renderer.decode(asked),
                response=renderer.decode([token for token, learned in tokens if learned]),
                reference="",
                problem=None,
            )
        )
    return samples
