"""The judge of scene responses: each error moves its own number, and no text makes it raise."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_megatron.data.scenes import Kind, Question, Scene
from prism_megatron.data.segments import response_text
from prism_megatron.data.teachers import required_steps
from prism_megatron.evaluation.scenes import judge

RED, BLUE, GREEN = Kind("red", "circle"), Kind("blue", "square"), Kind("green", "triangle")
SCENE = Scene("heldout", 0, 0, ((RED, 2), (GREEN, 3), (BLUE, 1)), Question("sum2", (RED, BLUE)), ())
CAPTION = "- red circle: 2\n- green triangle: 3\n- blue square: 1"
THINK = "red circle: 2\nblue square: 1\n2+1=3"


def test_a_perfect_response() -> None:
    judged = judge(SCENE, response_text(CAPTION, THINK, "3") + "<|im_end|>")
    assert judged.format_valid and judged.caption_exact and judged.reasoning_exact and judged.answer_right
    assert (judged.num_items, judged.items_right, judged.num_steps, judged.steps_right) == (3, 3, 3, 3)


@pytest.mark.parametrize(
    ("caption", "items", "right"),
    [
        ("- red circle: 2\n- green triangle: 2", 2, 1),  # a wrong count, an omission
        ("- red circle: 2\n- red circle: 2\n- green triangle: 3", 3, 2),  # a repetition counts once
        (CAPTION + "\n- red square: 1", 4, 3),  # an invention
        ("red circle 2", 1, 0),  # not an item
        (CAPTION.replace("circle: 2", "circle: 2 or 3"), 3, 2),  # more than a count
    ],
)
def test_caption_items(caption: str, items: int, right: int) -> None:
    judged = judge(SCENE, response_text(caption, THINK, "3"))
    assert (judged.num_items, judged.items_right, judged.items_in_scene) == (items, right, 3)
    assert judged.item_precision == right / items and judged.item_recall == right / 3
    assert not judged.caption_exact and judged.reasoning_exact


@pytest.mark.parametrize(
    ("think", "answer", "steps", "right", "verdict"),
    [
        ("2+1=3", "3", 3, 1, (False, True)),  # statements skipped
        ("red circle: 1\nblue square: 1\n1+1=2", "2", 3, 1, (False, False)),
        (THINK, "4", 3, 3, (False, False)),  # right reasoning, wrong answer
        (THINK + "\n2+1=3", "3", 4, 3, (False, True)),  # padding costs
        (THINK, " 3 ", 3, 3, (True, True)),
    ],
)
def test_reasoning_steps(think: str, answer: str, steps: int, right: int, verdict: tuple[bool, bool]) -> None:
    """``verdict``: is the reasoning exact, is the answer right."""
    judged = judge(SCENE, response_text(CAPTION, think, answer))
    assert (judged.num_steps, judged.steps_right) == (steps, right)
    assert (judged.reasoning_exact, judged.answer_right) == verdict and judged.caption_exact


def test_layout_and_letter_case_of_a_right_response_do_not_matter() -> None:
    """Indented lines, blank ones between, a yes in capitals. An end token inside, or a second one, is text."""
    question = replace(SCENE, question=Question("comparison", (RED, BLUE)))
    think = "\n".join(required_steps(question))
    caption, think = (text.replace("\n", "\n\n  ") for text in (CAPTION, think))
    judged = judge(question, response_text(caption, think, " YES\n"))
    assert judged.caption_exact and judged.reasoning_exact and judged.answer_right
    assert not judge(SCENE, response_text(CAPTION, THINK, "3<|im_end|>")).answer_right
    assert not judge(SCENE, response_text(CAPTION, THINK, "3") + 2 * "<|im_end|>").format_valid


def test_an_invalid_response_has_nothing() -> None:
    judged = judge(SCENE, "- red circle: 2")
    assert not judged.format_valid and not judged.answer_right and not judged.caption_exact
    assert judged.item_precision is None and judged.item_recall == 0 and judged.step_validity == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(), st.text(), st.text(), st.text())
def test_no_text_makes_it_raise(caption: str, think: str, answer: str, anything: str) -> None:
    for text in (anything, "\ud800" + anything, response_text(caption, think, answer)):
        judged = judge(SCENE, text)
        assert 0 <= judged.item_recall <= 1 and 0 <= judged.step_validity <= 1
        assert judged.item_precision is None or 0 <= judged.item_precision <= 1
