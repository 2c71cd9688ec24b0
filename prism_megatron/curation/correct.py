"""Is an answer right? Rules say so where they can, and a judge says it where they cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prism_megatron.curation.asking import Speaker
from prism_megatron.curation.files import Problem
from prism_megatron.curation.prompts.replies import verdict_of
from prism_megatron.curation.prompts.templates import as_data, template
from prism_megatron.rewards.check import is_checkable
from prism_megatron.rewards.checker import Checker
from prism_megatron.rewards.verdict import Ask

JUDGE_TRIES = 2
NO_VERDICT = "the judge gave no verdict"


@dataclass(frozen=True)
class Ruling:
    """Whether an answer is right, and who found so: ``rules`` or ``judge``."""

    right: bool
    by: str
    detail: str = ""
    notes: tuple[dict[str, Any], ...] = ()
    """of the calls of the judge that it took"""

    @property
    def plain(self) -> dict[str, Any]:
        """For a row."""
        return {"right": self.right, "by": self.by, "detail": self.detail}


def by_rules(problem: Problem) -> bool:
    """Whether rules can check answers to the problem."""
    return is_checkable(problem.answer, problem.answer_type)


class Correctness:
    """Checks answers. Threads share it."""

    def __init__(self, checker: Checker, judge: Speaker | None, *, judge_all: bool = False) -> None:
        """With ``judge_all`` an answer that rules find right is right only if the judge says so too."""
        self._checker, self._judge, self._judge_all = checker, judge, judge_all

    def can_check(self, problem: Problem) -> bool:
        """Whether anybody can."""
        return self._judge is not None or by_rules(problem)

    def rule(self, problem: Problem, answer: str) -> Ruling:
        """The ruling on one answer to a problem that can be checked. Raises PrismError as asking does."""
        if by_rules(problem):
            verdict = self._checker.check(Ask(answer, problem.answer, problem.answer_type))
            if not verdict.right or not self._judge_all:
                return Ruling(verdict.right, "rules", verdict.reason)
        assert self._judge is not None, "nobody can check it"
        return self._judged(self._judge, problem, answer)

    def _judged(self, judge: Speaker, problem: Problem, answer: str) -> Ruling:
        asked = template("judge")
        record = {"question": problem.asked, "right_answer": problem.answer, "given_answer": answer}
        text = asked.filled(RECORD=as_data(record))
        notes: list[dict[str, Any]] = []
        for number in range(JUDGE_TRIES):
            said = judge.ask(text, None, number=number, prompt=asked.version)
            response = said.response
            right = verdict_of(response.text) if response.answered and response.finish == "stop" else None
            if right is not None:
                notes.append(said.note("right" if right else "wrong"))
                return Ruling(right, "judge", notes=tuple(notes))
            notes.append(said.note("no verdict", response.kind if not response.answered else "", excerpt=True))
        return Ruling(False, "judge", NO_VERDICT, tuple(notes))
