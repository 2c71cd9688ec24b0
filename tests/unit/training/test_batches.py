"""What a micro-batch holds, read back from its tensors and compared with the groups that it was made of."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from prism_megatron.game.judged_rows import (
    ScorePart,
    ScoreRow,
    collect_scores,
    discriminator_batch,
    dropout_key,
    judged_prompt,
    prompt_slots,
    segment_row,
    segment_slots,
)
from prism_megatron.training.batches import BatchFormat, policy_batch, supervised_batch
from prism_megatron.training.experience import ExperienceRow
from prism_megatron.types import PERCEPTION, REASONING, Response, Rollout, TokenSequence, VersionSpan
from tests.unit.game.tiny_game import END, form, group, image, invalid, response, rollout, sequences_of

CAPTION_ALONE = group(response([8, 9]), rollout([10], [11, 12]), prompt=(4, 4))
GROUPS = [
    CAPTION_ALONE,
    group(response([13, 14], [15]), rollout([16], [17, 18]), invalid(19, 20), rollout([21, 22, 23], [24])),
    group(response([25], [26, 27, 28]), rollout([29], [30]), prompt=(3, 1, 3, 1)),
]
SHARES = (
    ScorePart(1, PERCEPTION, (None, 2)),
    ScorePart(1, REASONING, (None, 2)),
    ScorePart(0, PERCEPTION, (None, 0)),
    ScorePart(1, PERCEPTION, (None, 0), repeated=True),
    ScorePart(1, REASONING, (None, 0), repeated=True),
    ScorePart(2, PERCEPTION, (None, 0)),
    ScorePart(2, REASONING, (None, 0)),
)
COUNTS = (10, 4)
"""sequences of each tower in the whole step: more than are in this micro-batch"""


def tokens_of(key: ScoreRow, form: BatchFormat) -> tuple[int, ...]:
    own = GROUPS[key.group]
    return segment_row(
        own, own.reference if key.rollout is None else own.rollouts[key.rollout], key.tower, form
    ).token_ids


@pytest.mark.parametrize("share_prompts", [False, True])
def test_every_row_is_what_its_key_says_and_finds_its_own_reference(share_prompts: bool) -> None:
    """Claim: tokens, tower and pair of every row are those of its key, also where a reference stands there twice.

    With shared prompts what a row sees includes the prompt that it goes on from, read by its own tower.
    """
    own = form(4, share_prompts=share_prompts)
    batch, keys = discriminator_batch(GROUPS, SHARES, form=own, seed=1, step=2, sequences_per_tower=COUNTS)
    assert batch.tower_ids_Q is not None
    references, seen = batch.extras["reference_row"].tolist(), sequences_of(batch)
    for at, key in enumerate(keys):
        if key is None:
            assert references[at] == at
            assert not batch.extras["is_rollout"][at]
            continue
        assert seen[at] == tokens_of(key, own)
        assert batch.tower_ids_Q[at] == key.tower
        assert batch.extras["is_rollout"][at] == (key.rollout is not None)
        assert keys[references[at]] == ScoreRow(key.group, key.tower, None)
        if share_prompts:
            assert batch.tower_ids_Q[batch.prefixes[at]] == key.tower
    judged = [(key.group, key.tower, key.rollout) for key in keys if key is not None and key.rollout is not None]
    both = [(g, tower, r) for g, r in ((1, 0), (1, 2), (2, 0)) for tower in (PERCEPTION, REASONING)]
    assert sorted(judged) == sorted([(0, PERCEPTION, 0), *both])
    assert keys.count(None) == (7 if share_prompts else 0)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_what_counts_counts_once(share_prompts: bool) -> None:
    """A row weighs 1 over its tower's rows of the step; a repeated reference and a shared prompt weigh nothing."""
    batch, keys = discriminator_batch(
        GROUPS, SHARES, form=form(share_prompts=share_prompts), seed=1, step=2, sequences_per_tower=COUNTS
    )
    counted = [
        (key, weight) for key, weight in zip(keys, batch.extras["sequence_share"].tolist(), strict=True) if weight
    ]
    seen = [key for key, _ in counted if key is not None]
    assert len(counted) == len(seen) == len(set(seen)) == len({key for key in keys if key is not None})
    assert all(weight == pytest.approx(1 / COUNTS[key.tower]) for key, weight in counted if key is not None)
    assert "load_balance_weight" not in batch.extras


def test_the_balance_loss_weighs_rows_as_they_count() -> None:
    batch, _ = discriminator_batch(
        GROUPS, SHARES, form=form(), seed=1, step=2, load_balance=0.25, sequences_per_tower=COUNTS
    )
    torch.testing.assert_close(batch.extras["load_balance_weight"], 0.25 * batch.extras["sequence_share"])


def test_dropout_keys_differ_by_all_that_they_are_keyed_by() -> None:
    """Claim: seed, step, group, tower and sample each change the key, the reference being a sample of its own."""
    keys = {
        dropout_key(seed, step, ScoreRow(g, tower, r))
        for seed in (0, 1)
        for step in (0, 1)
        for g in (0, 1)
        for tower in (0, 1)
        for r in (None, 0, 1)
    }
    assert len(keys) == 2 * 2 * 2 * 2 * 3
    assert all(0 <= key < 2**63 for key in keys)
    assert dropout_key(1, 11, ScoreRow(0, 0, 0)) != dropout_key(11, 1, ScoreRow(0, 0, 0))
    own = form(share_prompts=True)
    batch, rows = discriminator_batch(GROUPS, SHARES, form=own, seed=1, step=2, sequences_per_tower=COUNTS)
    found = [0 if row is None else dropout_key(1, 2, row) for row in rows]
    assert batch.extras["dropout_key"].tolist() == found


@pytest.mark.parametrize("share_prompts", [False, True])
def test_only_what_counts_learns_by_its_slope(share_prompts: bool) -> None:
    """Claim: a reference that only fills up a micro-batch, and a prompt, have slope 0."""
    parts = (ScorePart(1, PERCEPTION, (None,)), ScorePart(0, PERCEPTION, (None,), repeated=True))
    batch, keys = discriminator_batch(
        GROUPS, parts, form=form(share_prompts=share_prompts), seed=1, step=2, sequences_per_tower=COUNTS,
        slopes={(1, PERCEPTION): 2.0, (0, PERCEPTION): 3.0},
    )  # fmt: skip
    expected = [2.0 if key == ScoreRow(1, PERCEPTION, None) else 0.0 for key in keys]
    assert batch.extras["score_slope"].tolist() == expected
    assert sum(expected) == 2.0


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("multiple", [1, 3])
def test_planned_slots_are_those_of_the_batch(share_prompts: bool, multiple: int) -> None:
    """Claim: what micro-batches are planned by, prompts included, is the length of the row that is then built."""
    own = form(multiple, share_prompts=share_prompts)
    for g, one in enumerate(GROUPS):
        for tower in one.towers:
            parts = (ScorePart(g, tower, (None, *one.valid_rollouts)),)
            batch, _ = discriminator_batch(GROUPS, parts, form=own, seed=1, step=2, sequences_per_tower=COUNTS)
            answers: list[Response | Rollout] = [one.reference, *(one.rollouts[r] for r in one.valid_rollouts)]
            planned = prompt_slots(one, own) + sum(segment_slots(one, answer, tower, own) for answer in answers)
            assert batch.input_ids_B_S.numel() == planned


def test_a_length_is_padded_to_the_next_multiple() -> None:
    assert [form(4).slot(length) for length in (1, 3, 4, 5, 8)] == [4, 4, 4, 8, 8]


def test_a_discriminator_of_text_sees_neither_picture_nor_its_tokens() -> None:
    """The whole segment stands behind what is left of the prompt, and behind that the end token."""
    picture = image()
    own = group(response([8, 9], [10, 11]), prompt=(5, 30, 31, 30, 6), images=[picture])
    assert judged_prompt(own, form()).images == (picture,)
    text = form(unseen_token_ids=frozenset({30, 31}))
    rows = [segment_row(own, own.reference, tower, text) for tower in (PERCEPTION, REASONING)]
    assert [row.token_ids for row in rows] == [(5, 6, 8, 9, END), (5, 6, 10, 11, END)]
    assert all(row.images == () for row in rows)
    with pytest.raises(ValueError, match="without a reasoning segment"):
        segment_row(CAPTION_ALONE, CAPTION_ALONE.reference, REASONING, text)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_images_stand_where_the_prompt_does(share_prompts: bool) -> None:
    """With every row, or with the shared prompts alone: the vision tower reads a picture once for each place it has."""
    shown = group(response([8], [9]), rollout([10], [11]), prompt=(5, 6), images=[image()])
    batch, keys = discriminator_batch(
        [shown],
        (ScorePart(0, PERCEPTION, (None, 0)), ScorePart(0, REASONING, (None, 0))),
        form=form(share_prompts=share_prompts),
        seed=1,
        step=2,
        sequences_per_tower=(2, 2),
    )
    expected = [(0,) if key is None or not share_prompts else () for key in keys]
    assert list(batch.images_by_sequence) == expected
    assert len(batch.images) == 1


def test_a_supervised_batch_has_its_mask_and_its_extras() -> None:
    """Rows of their own, not packed; no extra takes the place of the mask."""
    rows = [TokenSequence((5, 6, 7)), TokenSequence((8, 9))]
    extras = {"weight": [[0.5, 0.5, 0.25], [2.0, 1.0]], "label_mask": [[1.0] * 3, [1.0] * 2]}
    batch = supervised_batch(rows, [[0.0, 0.0, 1.0], [0.0, 1.0]], form=form(4), extras=extras)
    assert batch.input_ids_B_S.tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert batch.extras["label_mask"].tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    assert batch.extras["weight"].tolist() == [[0.5, 0.5, 0.25, 0], [2, 1, 0, 0]]


def test_scores_come_back_by_group_tower_and_rollout() -> None:
    """Two micro-batches; the score of a shared prompt, which has no key, is nowhere."""
    keys = [(None, ScoreRow(0, 1, None), ScoreRow(0, 1, 0)), (ScoreRow(1, 0, 2),)]
    scores = [torch.tensor([9.0, 1.0, 2.0]), torch.tensor([3.0])]
    assert collect_scores(scores, keys) == {(0, 1, None): 1.0, (0, 1, 0): 2.0, (1, 0, 2): 3.0}


def at(batch_values: torch.Tensor, places: Sequence[int]) -> list[float]:
    return batch_values[0, list(places)].tolist()


def test_a_policy_batch_has_every_figure_at_its_own_token() -> None:
    """Two rows, with an image and without, in slots of a multiple of 4; one was drawn by three policies.

    Only tokens of the version that trains are on-policy: neither older nor newer ones. Padding and prompts hold 0.
    """
    versions = [VersionSpan(3, 0, 1), VersionSpan(4, 1, 3), VersionSpan(5, 3, 4)]
    mixed = rollout([8], [9, 10], versions=versions, logprobs=[-0.1, -0.2, -0.3, -0.4])
    shown = group(response([8], [9]), mixed, prompt=(5, 6), images=[image()])
    text = group(response([8], [9]), invalid(11), prompt=(7, 7, 7, 7))
    rows = [
        ExperienceRow(shown.prompt, mixed, [1.0, 2.0, 3.0, 4.0]),
        ExperienceRow(text.prompt, text.rollouts[0], [5.0]),
    ]
    batch = policy_batch(rows, version=4, form=form(4))
    assert sequences_of(batch) == [(5, 6, 8, 9, 10, END), (7, 7, 7, 7, 11)]
    first, second = range(2, 6), range(12, 13)
    expected = {
        "label_mask": [1, 1, 1, 1, 1],
        "image_mask": [1, 1, 1, 1, 0],
        "on_policy_mask": [0, 1, 1, 0, 0],
        "advantages": [1, 2, 3, 4, 5],
        "rollout_logprobs": [-0.1, -0.2, -0.3, -0.4, -1.0],
    }
    assert batch.extras.keys() == {*expected, "kept_tokens"}
    assert batch.extras["kept_tokens"].tolist() == [4, 1]
    for name, values in expected.items():
        assert at(batch.extras[name], [*first, *second]) == pytest.approx(values), name
        elsewhere = [place for place in range(16) if place not in first and place not in second]
        assert not any(at(batch.extras[name], elsewhere)), name
