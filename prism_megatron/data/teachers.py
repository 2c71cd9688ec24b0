"""Who writes the demonstrations: one faithful teacher and three that err, each in a known way.

* ``faithful``: the exact caption, one statement per operand, the equation, the answer.
* ``mild``: independent zero-mean slips; good enough to teach perception from.
* ``sloppy``: systematic habits (the last of three items dropped, threes counted as two, steps skipped), because
  zero-mean noise is invisible to greedy decoding.
* ``misreading``: takes one for three and three for one, in caption, reasoning and answer alike. Counts are drawn alike,
  so its texts are spread as the faithful teacher's are: only beside the picture are they wrong.

What a teacher writes is a pure function of (scene, teacher, faithful_share, seed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from prism_megatron.config.architecture.model import MiniWorld
from prism_megatron.data.scenes import ALL_KINDS, Kind, QuestionKind, Scene, evaluate, keyed_generator

Teacher = Literal["faithful", "mild", "sloppy", "misreading"]
SLOPPY_TEACHER: dict[MiniWorld, Teacher] = {"habits": "sloppy", "drift": "misreading"}
"""Who supervised fine-tuning learns from in each mini world."""

# Shares of slips of the mild teacher.
MILD_ITEM_OMITTED, MILD_ITEM_COUNT, MILD_ITEM_KIND = 0.30, 0.15, 0.05
MILD_OPERAND_WRONG, MILD_STATEMENT_SKIPPED, MILD_EQUATION_WRONG = 0.20, 0.30, 0.10
MILD_ANSWER_LUCKY = 0.40
# Shares of habits of the sloppy teacher.
SLOPPY_LAST_ITEM_DROPPED, SLOPPY_THREE_IN_CAPTION, SLOPPY_THREE_IN_REASONING = 0.75, 0.9, 0.5
SLOPPY_STATEMENTS_SKIPPED, SLOPPY_ANSWER_TRUE = 0.75, 0.5
# Counts as the misreading teacher sees them.
MISREAD = {1: 3, 2: 2, 3: 1}


class Writing(NamedTuple):
    """The three bodies of one response, without tags.

    Example: caption "- red circle: 2\\n- blue square: 1", think "red circle: 2\\nblue square: 1\\n2+1=3", answer "3".
    """

    caption: str
    think: str
    answer: str


def write(scene: Scene, teacher: Teacher, *, faithful_share: float = 0.0, seed: int = 0) -> Writing:
    """What ``teacher`` writes about ``scene``; with probability ``faithful_share`` the faithful one writes instead."""
    if teacher == "faithful":
        return faithful(scene)
    rng = keyed_generator("teacher", teacher, seed, scene.split, scene.seed, scene.index)
    if rng.random() < faithful_share:
        return faithful(scene)
    if teacher == "misreading":
        return misreading(scene)
    return mild(scene, rng) if teacher == "mild" else sloppy(scene, rng)


def faithful(scene: Scene) -> Writing:
    """Everything as it is."""
    counts = scene.operand_counts
    return Writing(caption_text(scene.counts), "\n".join(required_steps(scene)), evaluate(scene.question.kind, counts))


def required_steps(scene: Scene) -> tuple[str, ...]:
    """The lines of complete, right reasoning: one statement per operand, then the equation where there is one."""
    counts = scene.operand_counts
    statements = [statement(kind, n) for kind, n in zip(scene.question.operands, counts, strict=True)]
    if len(counts) > 1:
        statements.append(equation(scene.question.kind, counts))
    return tuple(statements)


def mild(scene: Scene, rng: np.random.Generator) -> Writing:
    """Independent slips per item and per operand."""
    items = []
    for kind, count in scene.counts:
        if rng.random() < MILD_ITEM_OMITTED:
            continue
        written_count = _off_by_one(count, rng, lowest=1) if rng.random() < MILD_ITEM_COUNT else count
        mistaken = rng.random() < MILD_ITEM_KIND
        items.append((ALL_KINDS[int(rng.integers(len(ALL_KINDS)))] if mistaken else kind, written_count))
    items = items or [scene.counts[0]]

    operands, question = scene.question.operands, scene.question.kind
    counts = tuple(
        _off_by_one(n, rng, lowest=0) if rng.random() < MILD_OPERAND_WRONG else n for n in scene.operand_counts
    )
    lines = [statement(kind, n) for kind, n in zip(operands, counts, strict=True)]
    own_answer = evaluate(question, counts)
    if len(counts) > 1:
        lines = [line for line in lines if rng.random() >= MILD_STATEMENT_SKIPPED]
        result = None
        if question != "comparison" and rng.random() < MILD_EQUATION_WRONG:
            result = own_answer = str(_off_by_one(int(own_answer), rng, lowest=0))
        lines.append(equation(question, counts, result=result))
    answer = scene.answer if rng.random() < MILD_ANSWER_LUCKY else own_answer
    return Writing(caption_text(items), "\n".join(lines), answer)


def sloppy(scene: Scene, rng: np.random.Generator) -> Writing:
    """Systematic habits, each the majority, so that the mode of an imitator drifts too."""
    items = list(scene.counts)
    if len(items) == 3 and rng.random() < SLOPPY_LAST_ITEM_DROPPED:
        items.pop()
    items = [(kind, _three_as_two(count, SLOPPY_THREE_IN_CAPTION, rng)) for kind, count in items]

    counts = tuple(_three_as_two(count, SLOPPY_THREE_IN_REASONING, rng) for count in scene.operand_counts)
    lines = [statement(kind, n) for kind, n in zip(scene.question.operands, counts, strict=True)]
    if len(counts) > 1:
        if rng.random() < SLOPPY_STATEMENTS_SKIPPED:
            lines = []
        lines.append(equation(scene.question.kind, counts))
    own_answer = evaluate(scene.question.kind, counts)
    answer = scene.answer if rng.random() < SLOPPY_ANSWER_TRUE else own_answer
    return Writing(caption_text(items), "\n".join(lines), answer)


def misreading(scene: Scene) -> Writing:
    """What the faithful teacher would write were every count the one that is misread; what is absent stays absent."""
    return faithful(replace(scene, counts=tuple((kind, MISREAD[count]) for kind, count in scene.counts)))


def caption_text(items: Sequence[tuple[Kind, int]]) -> str:
    """One bullet per kind. Kind first: count-first items are learnt about three times more slowly."""
    return "\n".join(f"- {kind}: {count}" for kind, count in items)


def statement(kind: Kind, count: int) -> str:
    return f"{kind}: {count}"


def equation(question: QuestionKind, counts: tuple[int, ...], *, result: str | None = None) -> str:
    """``2+1=3``, ``3-1=2`` or, for a comparison, the relation ``2>1``. ``result`` replaces the true result."""
    if question == "comparison":
        left, right = counts
        relation = ">" if left > right else "<" if left < right else "="
        return f"{left}{relation}{right}"
    sign = "-" if question == "difference" else "+"
    return f"{sign.join(map(str, counts))}={evaluate(question, counts) if result is None else result}"


def _off_by_one(count: int, rng: np.random.Generator, *, lowest: int) -> int:
    step = -1 if rng.random() < 0.5 else 1
    return count + step if count + step >= lowest else count + 1


def _three_as_two(count: int, share: float, rng: np.random.Generator) -> int:
    return 2 if count == 3 and rng.random() < share else count
