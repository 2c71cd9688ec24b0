"""The same questions, answered by the policy of every stage: what the report shows side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_megatron.errors import DataError
from prism_megatron.evaluation.benchmark.answers import Answered, by_item
from prism_megatron.evaluation.benchmark.folder import read_evaluation
from prism_megatron.evaluation.sample import png_url
from prism_megatron.pipeline.plan import EVALUATIONS, Plan, Step
from prism_megatron.stages.evaluate.questions import read_questions

_SHOWN = 6


@dataclass(frozen=True)
class SideBySide:
    """One question with the greedy answer of every policy, by its stage's name."""

    image: str
    """PNG as a data URL, small"""
    question: str
    gold: str
    answers: Sequence[tuple[str, Answered]]


def samples_of(plan: Plan, done: Sequence[Step]) -> list[SideBySide]:
    """Some questions to which policies gave right and wrong answers, and where these are too few, the first others.

    Raises DataError for damaged answers, and ImageError for a picture that is gone.
    """
    steps = [step for step in done if step.key.startswith(EVALUATIONS)]
    if not steps:
        return []
    answered = [by_item(read_evaluation(plan.output / step.key).answers) for step in steps]
    config = steps[0].config
    questions = read_questions(
        config.data,
        part=config.part,
        limit=config.limit,
        scenes=config.scenes,
        seed=config.seed,
        mini=config.mini,
    )
    keys = [(one.item.set, one.item.id) for one in questions]
    if any(key not in own for own in answered for key in keys):
        raise DataError(f"{plan.output / EVALUATIONS}: an evaluation lacks a question; remove it, and play it again")
    differ = [place for place, key in enumerate(keys) if len({own[key][0].counts for own in answered}) > 1]
    chosen = sorted([*differ, *(place for place in range(len(keys)) if place not in set(differ))][:_SHOWN])
    return [
        SideBySide(
            png_url(questions[place].image()),
            questions[place].text,
            questions[place].gold,
            [(step.key.rpartition("/")[2], own[keys[place]][0]) for step, own in zip(steps, answered, strict=True)],
        )
        for place in chosen
    ]
