"""What the discriminator reads: from groups to the rows of its micro-batches, and from scores back to groups.

Shape suffixes: Q sequences of a micro-batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_megatron.engine.batch import Batch, Extra, collate
from prism_megatron.losses.load_balance import sequence_shares
from prism_megatron.training.batches import BatchFormat
from prism_megatron.types import TOWER_NAMES, PreferenceGroup, Response, Rollout, TokenSequence


@dataclass(frozen=True)
class ScoreRow:
    """What one discriminator row judges. ``rollout`` is None for the group's reference."""

    group: int
    tower: int
    rollout: int | None


@dataclass(frozen=True)
class ScorePart:
    """What a micro-batch has of a group, for one tower: some of its answers, None standing for the reference.

    Exactly one part of a group and tower has a reference that is not ``repeated``: what counts a reference once counts
    that one. Example: ``ScorePart(0, REASONING, (None, 4, 7))`` compares two rollouts with the reference beside them.
    """

    group: int
    tower: int
    answers: tuple[int | None, ...]
    repeated: bool = False


ScoreMicroBatch = tuple[ScorePart, ...]


@dataclass(frozen=True)
class ReferenceScore:
    """What a reference that is not in the micro-batch got: without dropout, and with it."""

    clean: float
    dropped: float


def judged_prompt(group: PreferenceGroup, form: BatchFormat) -> TokenSequence:
    """The prompt as the discriminator sees it.

    A discriminator of text reads it without the tokens that its images stand in, and no image.
    """
    shown = tuple(token for token in group.prompt.token_ids if token not in form.unseen_token_ids)
    return TokenSequence(shown, () if form.unseen_token_ids else group.prompt.images)


def judged_segment(
    group: PreferenceGroup, answer: Response | Rollout, tower: int, form: BatchFormat
) -> tuple[int, ...]:
    """What stands behind the prompt: one segment, then the end token on both sides of the game.

    Reference and rollout end in the same token, so the last token tells nothing about who wrote the segment (see
    docs/method.md, section 3). The caption is not in the reasoning's context.
    Raises ValueError for an answer without that segment.
    """
    span = answer.segments.of_tower(tower)
    if span is None:
        raise ValueError(
            f"prompt {group.prompt.id}: a response without a {TOWER_NAMES[tower]} segment cannot be judged"
        )
    return (*answer.token_ids[span.start : span.end], form.end_token_id)


def segment_row(group: PreferenceGroup, answer: Response | Rollout, tower: int, form: BatchFormat) -> TokenSequence:
    """A whole input of the discriminator: prompt and segment."""
    prompt = judged_prompt(group, form)
    return TokenSequence((*prompt.token_ids, *judged_segment(group, answer, tower, form)), prompt.images)


def prompt_slots(group: PreferenceGroup, form: BatchFormat) -> int:
    """Token slots of a part's prompt, where the segments do not repeat it."""
    return form.slot(len(judged_prompt(group, form).token_ids)) if form.share_prompts else 0


def segment_slots(group: PreferenceGroup, answer: Response | Rollout, tower: int, form: BatchFormat) -> int:
    """Token slots that a valid answer takes in a packed micro-batch, for one tower."""
    row = judged_segment if form.share_prompts else segment_tokens
    return form.slot(len(row(group, answer, tower, form)))


def segment_tokens(
    group: PreferenceGroup, answer: Response | Rollout, tower: int, form: BatchFormat
) -> tuple[int, ...]:
    """The ids of ``segment_row``."""
    return segment_row(group, answer, tower, form).token_ids


@dataclass(frozen=True)
class JudgedSequence:
    """One sequence of a discriminator's micro-batch. ``key`` is None for a prompt that several segments go on from."""

    tokens: TokenSequence
    tower: int
    key: ScoreRow | None
    counts: bool = True
    prefix: int | None = None


def judged_sequences(
    groups: Sequence[PreferenceGroup], parts: ScoreMicroBatch, form: BatchFormat
) -> list[JudgedSequence]:
    """Per part: the prompt, if it is shared, then reference and rollouts by their length.

    (Neighbours of one length attend in one call of the kernel.) A repeated reference does not count.
    """
    sequences: list[JudgedSequence] = []
    for part in parts:
        group, tower = groups[part.group], part.tower
        prefix = None
        if form.share_prompts:
            prefix = len(sequences)
            sequences.append(JudgedSequence(judged_prompt(group, form), tower, None, counts=False))
        rows = []
        for index in part.answers:
            answer = group.reference if index is None else group.rollouts[index]
            row = segment_row(group, answer, tower, form)
            if form.share_prompts:
                row = TokenSequence(judged_segment(group, answer, tower, form))
            key, counts = ScoreRow(part.group, tower, index), index is not None or not part.repeated
            rows.append(JudgedSequence(row, tower, key, counts, prefix))
        sequences += sorted(rows, key=lambda row: form.slot(len(row.tokens.token_ids)))
    if not form.share_prompts:
        sequences.sort(key=lambda row: form.slot(len(row.tokens.token_ids)))
    return sequences


def discriminator_batch(
    groups: Sequence[PreferenceGroup],
    parts: ScoreMicroBatch,
    *,
    form: BatchFormat,
    seed: int,
    step: int,
    load_balance: float = 0.0,
    sequences_per_tower: Sequence[int],
    references: Mapping[tuple[int, int], ReferenceScore] | None = None,
    slopes: Mapping[tuple[int, int], float] | None = None,
) -> tuple[Batch, tuple[ScoreRow | None, ...]]:
    """One packed micro-batch, and what each of its scores belongs to; None for a shared prompt's, which means nothing.

    ``groups`` are all of the step. Extras by sequence: ``reference_row`` place of its reference (its own for a prompt),
    ``is_rollout`` 1 for rollouts, ``dropout_key`` (see :func:`dropout_key`), all int64; ``sequence_share`` is 1 over
    the step's ``sequences_per_tower``, 0 for a reference that another micro-batch counts, and ``load_balance_weight``
    that times a ``load_balance`` coefficient above 0.
    ``references`` have scores by group and tower, where they are not in the micro-batch: those of each part stand
    behind its sequences, at the places that ``reference_row`` then names, as ``known_scores`` and ``known_dropped``.
    ``slopes`` say what the step's loss changes by with each reference's score: ``score_slope``.
    """
    sequences = judged_sequences(groups, parts, form)
    keys = [sequence.key for sequence in sequences]
    places = {(key.group, key.tower): at for at, key in enumerate(keys) if key is not None and key.rollout is None}
    own_extras: dict[str, Sequence[float]] = {}
    if references is not None:
        units = [(part.group, part.tower) for part in parts]
        places |= {unit: len(keys) + number for number, unit in enumerate(units)}
        own_extras[Extra.KNOWN_SCORES] = [references[unit].clean for unit in units]
        own_extras[Extra.KNOWN_DROPPED] = [references[unit].dropped for unit in units]
    if slopes is not None:
        own_extras[Extra.SCORE_SLOPE] = [
            slopes[row.key.group, row.key.tower] if row.key is not None and row.counts else 0.0 for row in sequences
        ]
    towers = [sequence.tower for sequence in sequences]
    counted = torch.tensor([sequence.counts for sequence in sequences])
    shares_Q = sequence_shares(towers, sequence_counts=sequences_per_tower).masked_fill(~counted, 0.0)
    if load_balance > 0.0:
        own_extras[Extra.LOAD_BALANCE_WEIGHT] = (load_balance * shares_Q).tolist()
    batch = collate(
        [sequence.tokens for sequence in sequences],
        pad_token_id=form.pad_token_id,
        multiple_of=form.length_multiple,
        device=form.device,
        pack=True,
        prefixes=[sequence.prefix for sequence in sequences] if form.share_prompts else (),
        tower_ids=towers,
        sequence_extras={
            **own_extras,
            Extra.SEQUENCE_SHARE: shares_Q.tolist(),
            Extra.REFERENCE_ROW: [at if key is None else places[key.group, key.tower] for at, key in enumerate(keys)],
            Extra.IS_ROLLOUT: [int(key is not None and key.rollout is not None) for key in keys],
            Extra.DROPOUT_KEY: [0 if key is None else dropout_key(seed, step, key) for key in keys],
        },
    )
    return batch, tuple(keys)


def dropout_key(seed: int, step: int, row: ScoreRow) -> int:
    """A 63-bit key of (seed, step, sample, tower): the dropout mask is the same in every layout and on resume."""
    text = f"{seed}/{step}/{row.group}/{row.tower}/{row.rollout}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def collect_scores(
    score_rows: Sequence[Tensor], keys: Sequence[Sequence[ScoreRow | None]]
) -> Mapping[tuple[int, int, int | None], float]:
    """Scores by (group, tower, rollout) from one ``[Q]`` tensor a micro-batch."""
    return {
        (key.group, key.tower, key.rollout): float(score)
        for scores, batch_keys in zip(score_rows, keys, strict=True)
        for score, key in zip(scores.tolist(), batch_keys, strict=True)
        if key is not None
    }
