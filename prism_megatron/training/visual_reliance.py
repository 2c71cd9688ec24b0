"""How much a policy's words depend on the image: their log-probs with it, less those with a blank one.

The measure is that of VA-OPD (arXiv 2605.21924), taken over segments. Responses are given, none is sampled; the blank
image has the same size, so that nothing but what is seen differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.data.pictures.images import blanked
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.bootstrap import Interval, statistic_interval
from prism_megatron.training.batches import BatchFormat
from prism_megatron.training.experience import Experience, ExperienceRow
from prism_megatron.training.policy_update import UpdatePlan, scores_of
from prism_megatron.training.token_logprobs import TokenScores
from prism_megatron.types import Prompt, Response, Rollout, Span, VersionSpan

CAPTION, REASONING, WHOLE = SEGMENTS = ("caption", "reasoning", "whole")
"""The caption and the reasoning with the answer, each with its tags, and all tokens with the end token."""


class Asked(NamedTuple):
    """A question with its image, and a response to it."""

    prompt: Prompt
    response: Response


class Likelihood(NamedTuple):
    """Of one segment of one response: its tokens, and their log-probs in all, in nats, with the image and with none."""

    tokens: int
    seen: float
    blank: float


@dataclass(frozen=True)
class Reliance:
    """What a segment's tokens owe to the image. All figures are nats a token; the interval is over questions.

    Example: ``Reliance(responses=256, tokens=9120, seen=-0.02, blank=-1.31, difference=Interval(1.29, 1.21, 1.37))``.
    """

    responses: int
    tokens: int
    seen: float
    blank: float
    difference: Interval


def visual_reliance(
    policy: MegatronEngine,
    asked: Iterable[Asked],
    *,
    form: BatchFormat,
    tokens_per_microbatch: int,
    world: World,
    at_once: int = 64,
    seed: int = 0,
) -> dict[str, Reliance]:
    """By segment, of those responses that have it; equal on every rank.

    Every rank calls this with the same ``asked``, whose images are held ``at_once`` at a time. Raises ValueError for a
    prompt without an image.
    """
    found: dict[str, list[Likelihood]] = {segment: [] for segment in SEGMENTS}
    plan = UpdatePlan(PolicyObjective(), form, tokens_per_microbatch)
    waiting = iter(asked)
    while chunk := list(islice(waiting, at_once)):
        for one in likelihoods(policy, chunk, plan, world=world):
            for segment, own in one.items():
                found[segment].append(own)
    return {segment: summary_of(own, seed=seed) for segment, own in found.items() if own}


def likelihoods(
    policy: MegatronEngine, asked: Sequence[Asked], plan: UpdatePlan, *, world: World
) -> list[Mapping[str, Likelihood]]:
    """Of each response, by segment, under ``policy`` at temperature 1; both readings are in the same pass."""
    if unseen := [one.prompt.id for one in asked if not one.prompt.images]:
        raise ValueError(f"prompt {unseen[0]!r} has no image to leave out")
    rows = [_row(one.prompt, one.response) for one in asked]
    rows += [_row(_without_image(one.prompt), one.response) for one in asked]
    # Every data-parallel rank has as many micro-batches as the others: the last row may stand several times.
    rows += [rows[-1]] * (-len(rows) % world.microbatch_rounds)
    scores = scores_of(policy, Experience(rows, version=0), plan, world=world)
    return [
        {segment: _likelihood(span, seen, none) for segment, span in _spans(one.response).items()}
        for one, seen, none in zip(asked, scores, scores[len(asked) :], strict=False)
    ]


def summary_of(found: Sequence[Likelihood], *, seed: int) -> Reliance:
    """Means over all tokens, with the 95 % bootstrap interval of their difference, whole responses resampled."""
    tokens = sum(one.tokens for one in found)
    pairs = [(one.seen - one.blank, float(one.tokens)) for one in found]
    return Reliance(
        responses=len(found),
        tokens=tokens,
        seen=sum(one.seen for one in found) / tokens,
        blank=sum(one.blank for one in found) / tokens,
        difference=statistic_interval(pairs, lambda flat: float(flat[0::2].sum() / flat[1::2].sum()), seed=seed),
    )


def _likelihood(span: Span, seen: TokenScores, none: TokenScores) -> Likelihood:
    here = slice(span.start, span.end)
    return Likelihood(span.end - span.start, sum(seen.logprobs[here]), sum(none.logprobs[here]))


def _spans(response: Response) -> dict[str, Span]:
    segments = response.segments
    spans = {CAPTION: segments.perception, REASONING: segments.reasoning, WHOLE: Span(0, len(response.token_ids))}
    return {segment: span for segment, span in spans.items() if span is not None}


def _without_image(prompt: Prompt) -> Prompt:
    return replace(prompt, images=tuple(map(blanked, prompt.images)))


def _row(prompt: Prompt, response: Response) -> ExperienceRow:
    count = len(response.token_ids)
    versions = (VersionSpan(0, 0, count),)
    rollout = Rollout(response.token_ids, (0.0,) * count, "stop", versions, response.segments)
    return ExperienceRow(prompt, rollout, advantages=[0.0] * count)
