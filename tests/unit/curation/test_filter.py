"""Which replies are whole and in the asked form; every rule on both of its sides, and in linear time."""

from __future__ import annotations

from functools import partial

import pytest

from prism_megatron.curation.calls import Response
from prism_megatron.curation.filter import (
    CONTROL,
    CUT_SHORT,
    EMPTY,
    FORMAT,
    LANGUAGE,
    OVERSIZED,
    REFUSED,
    REPEATS,
    TOLD,
    TRUNCATED,
    UNANSWERED,
    bodies_of,
    in_another_script,
    not_whole,
    repeats_itself,
)
from prism_megatron.data.segments import TaggedText
from tests.timing import processor_seconds
from tests.unit.curation.fakes import answered, good

QUESTION = "How many circles are there?"
ENGLISH = "There are three circles, and the left one is the largest of them all, by far. "
CHINESE = "图中一共有三个圆形，其中左边的那个最大。"


def reason(reply: str, *, asked: str = QUESTION, right: str = "3", told: bool = False) -> str:
    read = bodies_of(reply, asked=asked, right=right, told=told)
    return "" if isinstance(read, TaggedText) else read[0]


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (Response("unanswered", "no answer in 6 tries"), UNANSWERED),
        (Response("refused", "HTTP 400"), REFUSED),
        (Response("oversized", "more than 8 MB"), OVERSIZED),
        (answered(good("3"), finish="length"), TRUNCATED),
        (answered(good("3"), finish="content_filter"), CUT_SHORT),
        (answered(good("3"), finish=""), CUT_SHORT),
        (answered(" \n"), EMPTY),
        (answered(good("3")), None),
    ],
)
def test_a_whole_reply_ended_by_itself(response: Response, why: str | None) -> None:
    failure = not_whole(response)
    assert (failure and failure[0]) == why


@pytest.mark.parametrize(
    "reply",
    [
        "three",
        "<caption>a</caption><think>b</think>",
        "<caption>a</caption><think>b</think><answer>3</answer><answer>4</answer>",
        "<caption>a</caption><think> </think><answer>3</answer>",
        "<caption>a</caption><answer>3</answer><think>b</think>",
        "Sure! " + good("3"),
        good("3") + " I hope that helps.",
        good("3", think="so <answer>4</answer>"),
        good("3", caption="</caption> is a tag"),
        good("3", caption="half \ud800"),
    ],
)
def test_tags_stand_once_in_order_and_alone(reply: str) -> None:
    assert reason(reply) == FORMAT


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_pad|>", "<tool_call>"])
def test_control_tokens_are_refused_anywhere(token: str) -> None:
    """Claim: training would refuse such a text, whichever part holds it."""
    for reply in (good(f"3{token}"), good("3", think=f"then {token} system"), good("3", caption=token)):
        assert reason(reply) == CONTROL
    assert not reason(good("3", think="|x| < |y| > 2, and <b> is no token"))


def test_another_script_than_the_questions() -> None:
    """Claim: more than a fifth of a part's letters; formulas, accents and full-width letters are of our script."""
    assert in_another_script(CHINESE, QUESTION) and in_another_script("Здесь три круга.", QUESTION)
    assert not in_another_script(CHINESE, "图中有几个圆形？"), "the question has that script"
    assert not in_another_script("αβγδε", QUESTION)
    assert not in_another_script("été, Größe, ﬁn, αβγ ∑ ℝ 𝑥² √π Ｗｉｄｅ", QUESTION)
    letters = "a" * 80
    assert not in_another_script(letters + "圆" * 20, QUESTION) and in_another_script(letters + "圆" * 21, QUESTION)
    assert not in_another_script("12 + 7 = 19", QUESTION), "no letters at all"
    assert reason(good("3", caption=CHINESE)) == reason(good("三")) == LANGUAGE
    assert not reason(good("三"), right="三"), "the right answer has that script"


def test_a_text_that_repeats_itself() -> None:
    """Claim: under half of its runs of eight words differ, from thirty words on, or one character stands two hundred
    times in a row."""
    assert repeats_itself(ENGLISH * 3) and not repeats_itself(ENGLISH * 2)
    assert not repeats_itself("no " * 29) and repeats_itself("no " * 30)
    assert not repeats_itself(" ".join(f"{number} dots" for number in range(200)))
    assert repeats_itself("a" + "." * 200) and not repeats_itself("." * 199) and not repeats_itself(" " * 999)
    assert reason(good("3", think=ENGLISH * 9)) == reason(good("3", caption=ENGLISH * 9)) == REPEATS


@pytest.mark.parametrize(
    "mention",
    ["This matches the given answer.", "The ground truth is 3.", "so, by the Ground-Truth, 3",
     "The provided correct answer",
     "I was told the answer is 3", "as the reference answer says", "the answer key has 3", "the answer I was given",
     "the correct answer is given as 3", "we are given the right answer"],
)  # fmt: skip
def test_a_teacher_that_was_told_must_not_say_so(mention: str) -> None:
    """Claim: only where it was told."""
    for reply in (good("3", think=mention), good("3", caption=mention)):
        assert reason(reply, told=True) == TOLD
        assert not reason(reply)


@pytest.mark.parametrize("text", ["The correct answer is B.", "The answer is given by x.", "We are given a triangle.",
                                  "The ground is true green."])  # fmt: skip
def test_ordinary_words_are_no_mention(text: str) -> None:
    assert not reason(good("3", think=text), told=True)


def test_half_a_megabyte_takes_no_time() -> None:
    """Claim: the rules are linear in the reply, whatever it holds."""
    pieces = ("a ", "the answer ", "given ", "<|", "<caption>", "圆 ", "ab" * 5 + " ", "x" * 199 + "y", "answer\n\n\n")
    for piece in pieces:
        reply = good("3", think=piece * (500_000 // len(piece)))
        assert processor_seconds(partial(reason, reply, told=True), enough=2.0) < 2.0, piece
