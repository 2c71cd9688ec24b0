"""The second step: what strong models answer right too often falls, and so does what nobody could check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prism_megatron.curation.asking import Said, Speaker
from prism_megatron.curation.correct import Correctness
from prism_megatron.curation.files import Row
from prism_megatron.curation.prompts.pictures import data_url
from prism_megatron.curation.prompts.replies import final_answer
from prism_megatron.curation.prompts.templates import template
from prism_megatron.data.reading.intake import ImageError

NOT_CHECKABLE, BAD_IMAGE = "an answer that nobody can check", "an image that cannot be read"
TOO_EASY, NO_EVIDENCE = "a strong model passes", "a strong model gave no answer"


@dataclass(frozen=True)
class Selection:
    """``strong`` are the strong models, each with its number of samples."""

    strong: Sequence[tuple[Speaker, int]]
    correctness: Correctness
    keep_to: float
    """pass rate up to which a problem is kept"""

    def of(self, row: Row) -> Row:
        """The row with the strong models' highest pass rate, kept if that is low. Raises PrismError as asking does."""
        if not self.correctness.can_check(row.problem):
            return row.fallen(NOT_CHECKABLE, row.problem.answer_type)
        try:
            image = data_url(row.problem.image_path)
        except ImageError as error:
            return row.fallen(BAD_IMAGE, str(error))
        asked = template("strong")
        text = asked.filled(QUESTION=row.problem.asked)
        waiting = [
            [speaker.begin(text, image, number=number, prompt=asked.version) for number in range(samples)]
            for speaker, samples in self.strong
        ]
        notes: list[dict[str, Any]] = []
        rates = [self._pass_rate(row, [wait() for wait in own], notes) for own in waiting]
        given = [rate for rate in rates if rate is not None]
        highest = max(given, default=None)
        found = row.having("select", {"pass_rate": highest, "pass_rates": rates, "calls": notes})
        if highest is not None and highest > self.keep_to:
            return found.fallen(TOO_EASY, f"{highest:.3f}")
        return found if len(given) == len(rates) else found.fallen(NO_EVIDENCE)

    def _pass_rate(self, row: Row, said: Sequence[Said], notes: list[dict[str, Any]]) -> float | None:
        """Of a model's answers, those that are none (no reply came) left out; None where all are.

        A reply that was cut off, or that gives no answer in its tags, is a wrong answer.
        """
        right = answered = 0
        for one in said:
            if not one.response.answered:
                notes.append(one.note(one.response.kind, one.response.text))
                continue
            answered += 1
            answer = final_answer(one.response.text)
            ruling = self.correctness.rule(row.problem, answer) if answer else None
            is_right = ruling is not None and ruling.right
            right += is_right
            detail = f"by {ruling.by} {ruling.detail}".rstrip() if ruling else "no answer in its tags"
            notes.append(one.note("right" if is_right else "wrong", detail))
            notes.extend(ruling.notes if ruling else ())
        return right / answered if answered else None
