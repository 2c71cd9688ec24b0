"""Which answers are right: ``cases.jsonl`` has answers and golds of every kind, with what a strict reader says."""

from __future__ import annotations

import functools
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.rewards.check import is_checkable, judge, no_algebra, settle
from prism_megatron.rewards.kinds.latex import same_expression
from prism_megatron.rewards.verdict import Ask, NeedsAlgebraError, Verdict

CASES: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("cases.jsonl").read_text(encoding="utf-8").splitlines()
]
KINDS = ("letters", "truth", "number", "tuple", "interval", "set", "list", "ratio", "time", "latex", "text")


def verdict_of(answer: str, gold: str, answer_type: str | None = None) -> Verdict:
    return judge(Ask(answer, gold, answer_type), same_expression)


@pytest.mark.parametrize("kind", KINDS)
def test_cases_of_a_kind(kind: str) -> None:
    """Claim: every answer of the kind has the verdict of the file, and its gold is seen as of that kind."""
    wrong = []
    for case in (case for case in CASES if case["kind"] == kind):
        verdict = verdict_of(case["answer"], case["gold"], case.get("answer_type"))
        if (verdict.right, verdict.kind) != (case["right"], kind):
            wrong.append((case["answer"], case["gold"], verdict))
    assert not wrong


@pytest.mark.parametrize(
    ("gold", "answer_type", "checkable"),
    [
        ("B", "choice", True),
        ("true", "bool", True),
        ("13 cm", None, True),
        (r"\int_0^1 x dx", None, True),
        ("The Netherlands", "text", True),
        ("one two three four five six seven eight nine ten", "text", True),
        ("one two three four five six seven eight nine ten eleven", "text", False),
        ("x" * 1024, "text", False),
        ("a\x07", "text", False),
    ],
)
def test_what_no_rule_can_check(gold: str, answer_type: str | None, checkable: bool) -> None:
    """Claim: short texts and every other kind can be; sentences, and what guards refuse even of a gold, cannot."""
    assert is_checkable(gold, answer_type) is checkable


def test_every_gold_of_the_file_is_checkable() -> None:
    assert all(is_checkable(case["gold"], case.get("answer_type")) for case in CASES)


def test_the_file_has_enough_of_every_kind() -> None:
    assert len(CASES) >= 300
    both = Counter((case["kind"], case["right"]) for case in CASES)
    assert {kind for kind, _ in both} == set(KINDS)
    assert min(both.values()) >= 4
    assert sum(case.get("stage_note", False) for case in CASES) == 27, "the cases that math-verify alone gets wrong"


def test_most_kinds_need_no_worker() -> None:
    """Claim: algebra is asked for expressions, and for parts of tuples, intervals and lists that are such, alone."""
    asked = {
        case["kind"] for case in CASES if settle(Ask(case["answer"], case["gold"], case.get("answer_type"))) is None
    }
    assert asked == {"latex", "tuple", "interval", "set", "list"}
    with pytest.raises(NeedsAlgebraError):
        judge(Ask(r"\sqrt{8}", r"2\sqrt{2}"), no_algebra)


@pytest.mark.parametrize("case", [case for case in CASES if case["right"]][::4], ids=lambda case: case["gold"][:20])
def test_more_than_the_answer_is_wrong(case: dict[str, Any]) -> None:
    """Claim: a right answer that goes on with another value, or that is said twice, is wrong."""
    if case["kind"] in ("truth", "text", "letters"):
        others = [f"{case['answer']} or 61", f"{case['answer']} {case['answer']}"]
    else:
        others = [f"{case['answer']} or 61", f"{case['answer']}, 61", f"{case['answer']}; {case['answer']}"]
    for answer in others:
        assert not verdict_of(answer, case["gold"], case.get("answer_type")).right, answer


@pytest.mark.parametrize("length", [1023, 1024, 5000])
def test_long_answers_are_wrong(length: int) -> None:
    verdict = verdict_of("5".rjust(length, " "), "5")
    assert verdict.right == (length < 1024)
    assert verdict.guarded == (length >= 1024)


@pytest.mark.parametrize("answer", ["", "  ", "$$", "5\x00", "5\u200b", "\u202e5", "5\ud800", "\x1b[31m5"])
def test_empty_and_control_characters_are_wrong(answer: str) -> None:
    assert not verdict_of(answer, "5").right


@pytest.mark.parametrize("hidden", ["\x00", "\u200b", "\u202e", "\ue000"])
def test_what_cannot_be_seen_spoils_a_right_answer(hidden: str) -> None:
    verdict = verdict_of(f"B. the {hidden}circle", "B")
    assert not verdict.right
    assert verdict.reason == "guarded: control characters"
    assert verdict_of("B. the circle", "B").right


def test_the_tolerance_is_relative_and_for_decimals_alone() -> None:
    assert verdict_of("3000001.5", "3000000").right, "half a millionth"
    assert not verdict_of("3000004.0", "3000000").right, "more than a millionth"
    assert not verdict_of("3000001", "3000000").right, "a whole number is exact"
    assert not verdict_of("1000001/3000000", "1/3").right, "so is a fraction"


def _exact(record: dict[str, Any]) -> Any:
    """What a gold of the shared sets is, by its own type, told without any code of ours."""
    answer = record["answer"]
    if record["answer_type"] in ("integer", "float") or "/" in answer:
        return Fraction(answer)
    return answer


@pytest.mark.parametrize("with_type", [True, False])
def test_golds_of_real_sets_are_right_for_themselves_alone(shared_dir: Path, with_type: bool) -> None:
    """Claim: all pairs of golds of one type, over all four sets: equal values are right, others wrong.

    ``Fraction`` is the oracle of numbers, text itself of all else.
    """
    golds: dict[str, dict[str, Any]] = {}
    for path in sorted((shared_dir / "data").glob("*/data.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            kind = "number" if isinstance(_exact(record), Fraction) else record["answer_type"]
            golds.setdefault(kind, {})[record["answer"]] = record
    assert set(golds) == {"number", "choice", "bool", "text"}
    settled = functools.cache(lambda one, gold, kind: settle(Ask(one, gold, kind)))
    checked = 0
    for records in golds.values():
        for one in records.values():
            for gold in records.values():
                verdict = settled(one["answer"], gold["answer"], gold["answer_type"] if with_type else None)
                assert verdict is not None
                expected = _exact(one) == _exact(gold)
                assert verdict.right == expected, (one["answer"], gold["answer"], verdict)
                checked += 1
    assert checked > 40_000
