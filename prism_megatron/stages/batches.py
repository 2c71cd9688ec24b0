"""From rollout groups to micro-batches, and from score rows back to groups. No model here.

Shape suffixes: B rows, S tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_megatron.config.discriminator import SEGMENTS
from prism_megatron.engine.batch import Batch, collate
from prism_megatron.losses.load_balance import sequence_shares
from prism_megatron.stages.microbatches import MicroBatch
from prism_megatron.types import PreferenceGroup, Response, Rollout, RolloutGroup, TokenSequence

PERCEPTION, REASONING = 0, 1
TOWERS = (PERCEPTION, REASONING)
TOWER_NAMES = SEGMENTS


@dataclass(frozen=True)
class BatchFormat:
    """How rows become tensors: the model's pad and end tokens, the layout's length multiple, the device.

    ``unseen_token_ids`` are tokens of the prompt that the discriminator is not shown, its images with them: those that
    stand for a picture, or around one, under ``--modality text``.
    """

    pad_token_id: int
    end_token_id: int
    length_multiple: int
    device: torch.device
    unseen_token_ids: frozenset[int] = frozenset()

    def slot(self, length: int) -> int:
        """Tokens that a sequence fills in a packed micro-batch, its padding included."""
        return -(-length // self.length_multiple) * self.length_multiple


@dataclass(frozen=True)
class ScoreRow:
    """What one discriminator row judges. ``rollout`` is None for the group's reference."""

    group: int
    tower: int
    rollout: int | None


def segment_row(group: PreferenceGroup, answer: Response | Rollout, tower: int, form: BatchFormat) -> TokenSequence:
    """The discriminator's input: prompt, then one segment, then the end token on both sides of the game.

    A discriminator of text reads the prompt without the tokens that its images stand in, and no image.

    Reference and rollout rows end in the same token, so the last token tells nothing about who wrote the segment
    (method notes, trap 3). The caption is not in the reasoning row's context.
    """
    span = answer.segments.of_tower(tower)
    if span is None:
        raise ValueError(
            f"prompt {group.prompt.id}: a response without a {TOWER_NAMES[tower]} segment cannot be judged"
        )
    segment = answer.token_ids[span.start : span.end]
    prompt = group.prompt
    shown = tuple(token for token in prompt.token_ids if token not in form.unseen_token_ids)
    return TokenSequence((*shown, *segment, form.end_token_id), () if form.unseen_token_ids else prompt.images)


def segment_slots(group: PreferenceGroup, answer: Response | Rollout, form: BatchFormat) -> int:
    """Token slots that the judged rows of a valid answer fill in a packed micro-batch."""
    rows = (segment_row(group, answer, tower, form) for tower in group.towers)
    return sum(form.slot(len(row.token_ids)) for row in rows)


def discriminator_batch(
    groups: Sequence[PreferenceGroup],
    shares: MicroBatch,
    *,
    form: BatchFormat,
    seed: int,
    step: int,
    load_balance: float = 0.0,
    sequences_per_tower: Sequence[int],
) -> tuple[Batch, tuple[ScoreRow, ...]]:
    """One packed micro-batch: per share and tower that judges it a row for the reference and one per rollout.

    ``groups`` are all of the step. Row extras: ``reference_row`` index of the row's reference, ``is_rollout`` 1 for
    rollout rows, ``dropout_key`` (see :func:`dropout_key`), all int64; ``sequence_share`` is 1 over the step's
    ``sequences_per_tower``, 0 for a reference that another micro-batch counts, and ``load_balance_weight`` that times a
    ``load_balance`` coefficient above 0.
    """
    rows: list[tuple[TokenSequence, ScoreRow, bool]] = []
    for share in shares:
        group = groups[share.group]
        answers: list[tuple[int | None, Response | Rollout]] = [(None, group.reference)]
        answers += [(r, group.rollouts[r]) for r in share.rollouts]
        for tower in group.towers:
            for index, answer in answers:
                row = segment_row(group, answer, tower, form)
                rows.append((row, ScoreRow(share.group, tower, index), index is None and share.repeated))
    # Neighbours of one length attend in one call of the kernel.
    rows.sort(key=lambda row: form.slot(len(row[0].token_ids)))
    keys = [key for _, key, _ in rows]
    place_of_reference = {(key.group, key.tower): place for place, key in enumerate(keys) if key.rollout is None}
    towers = [key.tower for key in keys]
    counted_elsewhere = torch.tensor([repeated for _, _, repeated in rows])
    shares_Q = sequence_shares(towers, sequence_counts=sequences_per_tower).masked_fill(counted_elsewhere, 0.0)
    balance = {"load_balance_weight": (load_balance * shares_Q).tolist()} if load_balance > 0.0 else {}
    batch = collate(
        [row for row, _, _ in rows],
        pad_token_id=form.pad_token_id,
        multiple_of=form.length_multiple,
        device=form.device,
        pack=True,
        tower_ids=towers,
        sequence_extras={
            **balance,
            "sequence_share": shares_Q.tolist(),
            "reference_row": [place_of_reference[key.group, key.tower] for key in keys],
            "is_rollout": [int(key.rollout is not None) for key in keys],
            "dropout_key": [dropout_key(seed, step, key) for key in keys],
        },
    )
    return batch, tuple(keys)


def dropout_key(seed: int, step: int, row: ScoreRow) -> int:
    """A 63-bit key of (seed, step, sample, tower): the dropout mask is the same in every layout and on resume."""
    text = f"{seed}/{step}/{row.group}/{row.tower}/{row.rollout}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def collect_scores(
    score_rows: Sequence[Tensor], keys: Sequence[Sequence[ScoreRow]]
) -> Mapping[tuple[int, int, int | None], float]:
    """Scores by (group, tower, rollout) from one ``[B]`` tensor a micro-batch."""
    return {
        (key.group, key.tower, key.rollout): float(score)
        for scores, batch_keys in zip(score_rows, keys, strict=True)
        for score, key in zip(scores.tolist(), batch_keys, strict=True)
    }


def policy_batch(
    rows: Sequence[tuple[RolloutGroup, Rollout]],
    advantages: Sequence[Sequence[float]],
    *,
    version: int,
    form: BatchFormat,
) -> Batch:
    """One packed micro-batch of prompts with a rollout each.

    ``advantages[b]`` has one value per response token. Token extras stand at the position of the *label* token:
    ``label_mask`` 1 on response tokens, ``image_mask`` the same for prompts with images only, ``on_policy_mask`` the
    same for tokens drawn with ``version`` of the policy only, ``advantages``, and ``rollout_logprobs`` as the rollout
    engine drew them.
    """
    sequences: list[TokenSequence] = []
    names = ("label_mask", "image_mask", "on_policy_mask", "advantages", "rollout_logprobs")
    extras: dict[str, list[list[float]]] = {name: [] for name in names}
    for (group, rollout), token_advantages in zip(rows, advantages, strict=True):
        zeros = [0.0] * len(group.prompt.token_ids)
        sequences.append(TokenSequence((*group.prompt.token_ids, *rollout.token_ids), group.prompt.images))
        extras["label_mask"].append(zeros + [1.0] * len(rollout.token_ids))
        extras["image_mask"].append(zeros + [float(bool(group.prompt.images))] * len(rollout.token_ids))
        extras["on_policy_mask"].append([*zeros, *(float(drawn == version) for drawn in rollout.token_versions())])
        extras["advantages"].append([*zeros, *token_advantages])
        extras["rollout_logprobs"].append([*zeros, *rollout.logprobs])
    return _collate_rows(sequences, extras, form, pack=True)


def supervised_batch(
    rows: Sequence[TokenSequence], label_masks: Sequence[Sequence[float]], *, form: BatchFormat
) -> Batch:
    """One micro-batch of demonstrations; ``label_mask`` is 1 on the tokens to learn."""
    return _collate_rows(rows, {"label_mask": label_masks}, form)


def _collate_rows(
    rows: Sequence[TokenSequence],
    extras: Mapping[str, Sequence[Sequence[float]]],
    form: BatchFormat,
    *,
    pack: bool = False,
) -> Batch:
    return collate(
        rows,
        pad_token_id=form.pad_token_id,
        multiple_of=form.length_multiple,
        device=form.device,
        pack=pack,
        token_extras=extras,
    )
