"""What a model said, whoever was asked, and how it becomes lines with verdicts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from prism_megatron.data.segments import TAGS
from prism_megatron.evaluation.benchmark.answers import Answered, Place, places_of
from prism_megatron.rewards.answers import plain
from prism_megatron.rewards.rewarder import Rewarded, Rewarder, Sampled
from prism_megatron.rewards.verdict import GuardedError
from prism_megatron.stages.evaluate.questions import Batch, Question

_GOES_ON = re.compile(rf"</{TAGS[-1]}>[\s\ufffd]*[^\s\ufffd]")


@dataclass(frozen=True)
class Said:
    """One answer as it came, without its end token; with a ``failure`` there is none.

    Example: ``Said("<caption>…</answer>", ended=True, truncated=False, tokens=71)``.
    """

    text: str = ""
    ended: bool = False
    """by the token that ends a turn"""
    truncated: bool = False
    """cut off at the greatest length"""
    tokens: int | None = None
    failure: str = ""


class Asker(Protocol):
    """Whoever gets answers. All ranks call it together."""

    def ask(self, batch: Batch) -> list[list[Said]]:
        """Of each question the greedy answer, then the samples."""

    def close(self) -> None:
        """Release what it holds. May be called again."""


def until_it_goes_on(text: str) -> str:
    """A response up to the first character after its answer, where it goes on: no more of it can make it valid.

    Who samples in this process stops there, a server does not: what is kept of both is the same.
    """
    found = _GOES_ON.search(text)
    return text if found is None else text[: found.end()]


def judged(batch: Batch, said: Sequence[Sequence[Said]], rewarder: Rewarder) -> list[Answered]:
    """The lines of a batch. Raises RewardError as ``Rewarder``."""
    under_way = [
        rewarder.submit([_sampled(question, one) for one in answers if not one.failure])
        for question, answers in zip(batch.questions, said, strict=True)
    ]
    lines: list[Answered] = []
    for question, answers, future in zip(batch.questions, said, under_way, strict=True):
        rewards = iter(future.result())
        for place, one in zip(places_of(question.item, len(answers) - 1), answers, strict=True):
            lines.append(_failed(place, one) if one.failure else _line(place, one, next(rewards)))
    return lines


def _sampled(question: Question, said: Said) -> Sampled:
    return Sampled(question.item.id, question.text, question.gold, said.text, said.ended, question.answer_type)


def _line(place: Place, said: Said, rewarded: Rewarded) -> Answered:
    verdict = rewarded.verdict
    return Answered(
        *place,
        counts=rewarded.reward.answer > 0,
        right=verdict.right,
        valid=rewarded.read.valid,
        truncated=said.truncated,
        tokens=said.tokens,
        kind=verdict.kind,
        answer=_vote(rewarded.read.answer),
        problem="; ".join(one for one in (rewarded.read.problem, verdict.reason) if one),
        text=said.text,
        failure="",
    )


def _failed(place: Place, said: Said) -> Answered:
    return Answered(
        *place,
        counts=False,
        right=False,
        valid=False,
        truncated=False,
        tokens=None,
        kind="",
        answer="",
        problem="",
        text="",
        failure=said.failure,
    )


def _vote(answer: str) -> str:
    """The answer as plain text, by which a majority counts it."""
    try:
        return plain(answer)
    except GuardedError:
        return " ".join(answer.split())
