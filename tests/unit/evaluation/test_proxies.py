"""The counting rules on texts as teachers write them, and the distance beside two independent definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_megatron.data.segments import response_text
from prism_megatron.evaluation.proxies import (
    ResponseForm,
    count_items,
    count_steps,
    response_form,
    wasserstein_1,
)


@pytest.mark.parametrize(
    ("caption", "items"),
    [
        ("- red circle: 2\n- blue square: 1", 2),
        ("A photo.\n* one\n  • two\n+ three\nno bullet", 3),
        ("-5 degrees outside\n**bold** start", 0),
        ("", 0),
    ],
)
def test_items_are_lines_that_open_with_a_bullet(caption: str, items: int) -> None:
    """A minus sign and bold text are no bullets."""
    assert count_items(caption) == items


@pytest.mark.parametrize(
    ("reasoning", "steps"),
    [
        ("1. look\n2) count\n3: add\nso it is 4", 3),
        ("**Step 1** look\nStep 2: count\n## Step 3\ntext", 3),
        ("red circle: 2\nblue square: 1\n2+1=3", 3),
        ("First I look\nat the picture.\n\nThen I count.\n \nDone.", 3),
        ("1.5 metres is the width", 1),
        ("I look.\n\nStep 1: count\n\nDone.", 1),
        ("I count\nin step 2 of it\nby 3. hand", 3),
        ("  \n ", 0),
    ],
)
def test_steps_are_numbered_lines_else_paragraphs(reasoning: str, steps: int) -> None:
    """A decimal number opens no numbered line; a single one makes the paragraphs around it no steps."""
    assert count_steps(reasoning) == steps


def test_only_valid_responses_are_counted() -> None:
    text = response_text("- a\n- b", "one\ntwo\nthree", "4")
    assert response_form(text, tokens=31) == ResponseForm(caption_items=2, reasoning_steps=3, tokens=31)
    assert response_form(text.replace("</think>", ""), tokens=30) is None


counts = st.lists(st.integers(-20, 20), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(a=counts, b=counts)
def test_distance_is_the_cost_of_the_best_matching(a: list[int], b: list[int]) -> None:
    """Repeating both samples to one size, the best matching pairs them in order; float64, exact to 1e-12."""
    matched = np.abs(np.sort(np.repeat(a, len(b))) - np.sort(np.repeat(b, len(a)))).mean()
    assert wasserstein_1(a, b) == pytest.approx(matched, abs=1e-12)
    assert wasserstein_1(a, [x + 3 for x in a]) == pytest.approx(3.0, abs=1e-12)


def test_there_is_no_distance_without_data() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        wasserstein_1([], [1.0])
