"""What counts as the same word, question and answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prism_megatron.curation.duplicates.words import (
    answer_of,
    is_telling,
    overlap,
    plain_text,
    shingles_of,
    words_of,
)
from prism_megatron.data.records import Record

PROBLEM = Record("a", Path("a.png"), "Why?", None, "7", None, None, "made")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("How many  RED\ncircles, then?", ["how", "many", "red", "circles", "then"]),
        ("ﬁnd ２ × x − 3", ["find", "2", "×", "x", "−", "3"]),  # compatible signs
        ("-3 + (4)", ["-", "3", "+", "4"]),
        ("共有多少 7個？", ["共", "有", "多", "少", "7", "個"]),
        ("Straße", ["strasse"]),
        ("?!", []),
        ("\ud800 lone", ["\ud800", "lone"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_shingles_are_neighbours_and_their_overlap_is_the_jaccard_index() -> None:
    one, other = (shingles_of(words_of(text)) for text in ("a b c d", "a b c e"))
    assert one == {("a", "b"), ("b", "c"), ("c", "d")}
    assert overlap(one, other) == 2 / 4
    assert overlap(one, one) == 1
    assert shingles_of(["a"]) == {("a",)} and shingles_of([]) == {()}
    assert overlap(frozenset(), frozenset()) == 0


def test_answers_are_equal_where_what_is_answered_is() -> None:
    """Claim: a chosen text counts and not its letter, and a number's value and not its spelling."""
    assert plain_text(" A\tb ") == "a b"
    first, moved = (
        replace(PROBLEM, choices=choices, answer=letter)
        for choices, letter in ((("Red", "blue"), "A"), (("green", "red"), "B"))
    )
    assert answer_of(first) == answer_of(moved) == "red"
    assert {answer_of(replace(PROBLEM, answer=text)) for text in ("7", "7.0", "+7.00", "７")} == {"7"}
    assert answer_of(replace(PROBLEM, answer="100")) == "100"
    assert answer_of(replace(PROBLEM, answer="5/16")) == "5/16"
    assert answer_of(replace(PROBLEM, answer="1" + "0" * 5000)) == "1" + "0" * 5000
    assert [is_telling(text) for text in ("true", "no", "7", "red")] == [False, False, True, True]
