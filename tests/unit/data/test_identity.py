"""What a checkpoint remembers of its data: any other text, order or batch is another one."""

from __future__ import annotations

import pytest

from prism_megatron.data.identity import Identity, identity_of, what_differs

PARTS = [("a\nHow many?", (1, 2)), ("b\nWhich?", (3,))]


def of(parts: list[tuple[str, tuple[int, ...]]] = PARTS, *, flag: str = "data", batch_size: int = 4) -> Identity:
    return identity_of(flag, parts, batch_size=batch_size)


def test_the_same_data_is_the_same() -> None:
    assert what_differs(of(), of([*PARTS])) is None
    assert of()["count"] == 2


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (of(PARTS[:1]), "there were 2 examples and are 1"),
        (of(PARTS[::-1]), "not the same ones in the same order"),
        (of([PARTS[0], ("b\nWhich one?", (3,))]), "not the same ones"),
        (of([PARTS[0], ("b\nWhich?", (4,))]), "not the same ones"),
        (of([("a\nHow many?", (1,)), ("2b\nWhich?", (3,))]), "not the same ones"),
        (of([("a", (12,)), PARTS[1]]), "not the same ones"),
        (of(batch_size=8), "batches of 4 are now of 8"),
        (of(PARTS[:1], batch_size=8), "batches of 4 are now of 8 and there were 2 examples and are 1"),
        (of(flag="pairs"), "it trained on --data, and now on --pairs"),
    ],
)
def test_what_differs_is_said(other: Identity, words: str) -> None:
    found = what_differs(of(), other)
    assert found is not None and words in found


def test_pieces_are_not_run_together() -> None:
    """Claim: the border of two texts, and that of text and tokens, is part of the digest."""
    assert of([("ab", ()), ("c", ())]) != of([("a", ()), ("bc", ())])
    assert of([("a", (1, 2))]) != of([("a", (12,))])
    assert of([("a1", ())]) != of([("a", (1,))])
