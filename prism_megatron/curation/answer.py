"""The fourth step: the teacher answers, and is asked again until its reply is whole, in the asked form and right.

A reply that is not whole, or not in the asked form, is asked for again, up to ``attempts`` replies. Where it is and its
answer is wrong, the teacher is told the right one and asked again, up to ``attempts`` replies counted anew. Those pass
the same filter, and a wrong one among them is asked for again like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from prism_megatron.curation.asking import Speaker
from prism_megatron.curation.correct import Correctness
from prism_megatron.curation.files import Problem, Row
from prism_megatron.curation.filter import bodies_of, not_whole
from prism_megatron.curation.prompts.pictures import data_url
from prism_megatron.curation.prompts.templates import Template, template
from prism_megatron.curation.select import BAD_IMAGE
from prism_megatron.data.reading.intake import ImageError
from prism_megatron.data.segments import TaggedText

WRONG, RIGHT = "wrong", "right"
NO_WHOLE, STILL_WRONG = "no whole reply in the asked form", "a wrong answer"
Phase = Literal["plain", "told"]


@dataclass(frozen=True)
class Attempt:
    """What one reply came to: ``outcome`` is right, wrong, or why it was filtered out."""

    outcome: str
    detail: str
    bodies: TaggedText | None


@dataclass(frozen=True)
class Answering:
    """Asks the teacher."""

    teacher: Speaker
    correctness: Correctness
    attempts: int
    """replies, at most, without the right answer told, and as many with it"""
    tell_answer: bool

    def of(self, row: Row) -> Row:
        """The row with the teacher's caption and reasoning, kept if there are any. Raises PrismError as asking does."""
        try:
            image = data_url(row.problem.image_path)
        except ImageError as error:
            return row.fallen(BAD_IMAGE, str(error))
        notes: list[dict[str, Any]] = []
        last = self._tries(row.problem, image, "plain", notes)
        unaided = last.outcome == RIGHT
        if last.outcome == WRONG and self.tell_answer:
            last = self._tries(row.problem, image, "told", notes)
        attempts = sum(note["role"] == self.teacher.role for note in notes)
        found: dict[str, Any] = {"attempts": attempts, "unaided": unaided, "calls": notes}
        if last.outcome != RIGHT:
            reason = STILL_WRONG if last.outcome == WRONG else NO_WHOLE
            return row.having("answer", found).fallen(reason, f"{last.outcome}: {last.detail}".removesuffix(": "))
        assert last.bodies is not None
        text = {"caption": last.bodies.caption.strip(), "solution": last.bodies.think.strip()}
        return row.having("answer", found | text | {"answered": last.bodies.answer.strip()})

    def _tries(self, problem: Problem, image: str, phase: Phase, notes: list[dict[str, Any]]) -> Attempt:
        """The first reply that is right or, without the right answer told, wrong; else the last one."""
        asked = template("teacher" if phase == "plain" else "teacher_told")
        last = Attempt("", "", None)
        for number in range(self.attempts):
            last = self._try(problem, image, asked, phase=phase, number=number, notes=notes)
            if last.outcome == RIGHT or (last.outcome == WRONG and phase == "plain"):
                break
        return last

    def _try(
        self, problem: Problem, image: str, asked: Template, *, phase: Phase, number: int, notes: list[dict[str, Any]]
    ) -> Attempt:
        text = asked.filled(QUESTION=problem.asked, ANSWER=problem.answer)
        said = self.teacher.ask(text, image, number=number, prompt=asked.version)
        ruling: dict[str, Any] | None = None
        judged: tuple[dict[str, Any], ...] = ()
        if (failure := not_whole(said.response)) is not None:
            attempt = Attempt(*failure, None)
        else:
            read = bodies_of(said.response.text, asked=problem.asked, right=problem.answer, told=phase == "told")
            if isinstance(read, tuple):
                attempt = Attempt(*read, None)
            else:
                found = self.correctness.rule(problem, read.answer)
                ruling, judged = found.plain, found.notes
                attempt = Attempt(RIGHT if found.right else WRONG, f"by {found.by} {found.detail}".rstrip(), read)
        note = said.note(attempt.outcome, attempt.detail, excerpt=attempt.outcome != RIGHT)
        notes.extend([note | {"phase": phase, "ruling": ruling}, *judged])
        return attempt
