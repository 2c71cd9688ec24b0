"""Which texts two sets are compared by, and what is measured of them."""

from __future__ import annotations

import numpy as np
import pytest

from prism_megatron.data.segments import response_text
from prism_megatron.evaluation.drift.compare import MIN_TEXTS, Measured, Plan, compare
from prism_megatron.evaluation.drift.responses import Responses, segments_of
from tests.unit.evaluation.drift.made_up import reasonings, words_at_random

PLAN = Plan(permutations=99)


def _by_kind(found: list[Measured], what: str) -> dict[str, Measured]:
    return {one.kind: one for one in found if one.what == what}


def _texts(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(["red", "green", "blue", "two"], size=12)) for _ in range(count)]


@pytest.mark.parametrize(
    ("first_ids", "second_ids", "pairs", "sizes"),
    [
        ((0, 50), (0, 50), True, (50, 50)),
        ((0, 50), (0, 200), True, (50, 50)),
        ((0, 50), (25, 75), True, (25, 25)),
        ((0, 50), (26, 76), False, (50, 26)),
        ((0, 50), (50, 90), False, (50, 40)),
    ],
)
def test_answers_to_the_same_questions_are_pairs(
    first_ids: tuple[int, int], second_ids: tuple[int, int], pairs: bool, sizes: tuple[int, int]
) -> None:
    """Claim: from half of the smaller set on; below, the second's answers to common questions are left out."""
    first = reasonings("a", _texts(first_ids[1] - first_ids[0]), first_id=first_ids[0])
    second = reasonings("b", _texts(second_ids[1] - second_ids[0], 1), first_id=second_ids[0])
    for one in compare(first, second, words_at_random, PLAN):
        if one.what.startswith("reasoning") and one.kind != "mmd2_same_length":
            assert (one.pairs, (one.num_first, one.num_second)) == (pairs, sizes)


def test_pairs_are_partners() -> None:
    """Claim: whatever the order of the second file, each answer is beside its own question's."""
    texts = _texts(60)
    second = reasonings("b", texts)
    second = Responses("b", dict(reversed(list(second.texts.items()))), 0, 0)
    own = _by_kind(compare(reasonings("a", texts), second, words_at_random, PLAN), "reasoning")["mmd2"]
    assert own.distance is not None
    assert own.distance.value == pytest.approx(0.0, abs=1e-12) and own.distance.p == 1.0


def test_too_few_texts_are_not_measured() -> None:
    first = reasonings("a", _texts(MIN_TEXTS - 1))
    found = compare(first, reasonings("b", _texts(300, 1), first_id=1000), words_at_random, PLAN)
    assert all(one.distance is None for one in found)
    assert _by_kind(found, "reasoning")["mmd2"].num_first == MIN_TEXTS - 1
    enough = reasonings("a", _texts(MIN_TEXTS))
    found = compare(enough, reasonings("b", _texts(300, 1), first_id=1000), words_at_random, PLAN)
    assert _by_kind(found, "reasoning")["mmd2"].distance is not None
    assert _by_kind(found, "caption")["mmd2"].distance is None


def test_at_most_so_many_are_drawn() -> None:
    plan = Plan(permutations=19, most=40)
    first, second = reasonings("a", _texts(90)), reasonings("b", _texts(70, 1), first_id=1000)
    own = _by_kind(compare(first, second, None, plan), "reasoning_words")["wasserstein"]
    assert (own.num_first, own.num_second) == (40, 40)
    paired = _by_kind(compare(first, reasonings("b", _texts(70, 1)), None, plan), "reasoning_words")["wasserstein"]
    assert paired.pairs and (paired.num_first, paired.num_second) == (40, 40)


def test_proxies_count_segments_and_embeddings_are_by_choice() -> None:
    """By hand: 2 against 3 items, 1 against 2 steps, in every response; all of one are apart from all of the other."""
    first = {str(n): segments_of(response_text("- a\n- b", "one", "1")) for n in range(30)}
    second = {str(n): segments_of(response_text("- a\n- b\n- c d", "1. one\n2. two", "1")) for n in range(100, 130)}
    found = compare(Responses("a", first, 0, 0), Responses("b", second, 0, 0), None, PLAN)
    assert {one.what for one in found} == {
        "caption_items", "reasoning_steps", "caption_words", "reasoning_words", "words",
    }  # fmt: skip
    for proxy, means in (("caption_items", (2, 3)), ("reasoning_steps", (1, 2)), ("caption_words", (4, 7))):
        own = _by_kind(found, proxy)
        wasserstein, jensen = own["wasserstein"].distance, own["jensen_shannon"].distance
        assert (own["wasserstein"].first_mean, own["wasserstein"].second_mean) == means
        assert wasserstein is not None and wasserstein.value == means[1] - means[0] and wasserstein.p == 0.01
        assert jensen is not None and jensen.value == pytest.approx(1.0, abs=1e-12)
