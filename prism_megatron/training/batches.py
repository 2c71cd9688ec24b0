"""From rows of tokens to micro-batches. No model here.

Shape suffixes: B rows, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from prism_megatron.engine.batch import Batch, Extra, collate
from prism_megatron.training.experience import ExperienceRow
from prism_megatron.types import TokenSequence


@dataclass(frozen=True)
class BatchFormat:
    """How rows become tensors: the model's pad and end tokens, the layout's length multiple, the device.

    ``unseen_token_ids`` are tokens of the prompt that the discriminator is not shown, its images with them: those that
    stand for a picture, or around one, under ``--modality text``. ``share_prompts`` has the discriminator read a prompt
    once for all the segments that one tower judges after it, which is exact: no token sees what follows it.
    """

    pad_token_id: int
    end_token_id: int
    length_multiple: int
    device: torch.device
    unseen_token_ids: frozenset[int] = frozenset()
    share_prompts: bool = False

    def slot(self, length: int) -> int:
        """Tokens that a sequence fills in a packed micro-batch, its padding included."""
        return -(-length // self.length_multiple) * self.length_multiple


@dataclass(frozen=True)
class PlannedBatch:
    """A micro-batch, and the numbers of the experience's rows that lie in it, one after the other."""

    rows: tuple[int, ...]
    batch: Batch


def policy_batch(rows: Sequence[ExperienceRow], *, version: int, form: BatchFormat) -> Batch:
    """One packed micro-batch of prompts with a rollout each.

    Token extras stand at the position of the *label* token:
    ``label_mask`` 1 on response tokens, ``image_mask`` the same for prompts with images only, ``on_policy_mask`` the
    same for tokens drawn with ``version`` of the policy only, ``advantages``, and ``rollout_logprobs`` as the rollout
    engine drew them. ``old_logprobs``, ``reference_logprobs`` and ``correction`` are there where the rows have them,
    all or none; ``kept_tokens`` counts a sequence's.
    """
    sequences: list[TokenSequence] = []
    names = (Extra.LABEL_MASK, Extra.IMAGE_MASK, Extra.ON_POLICY_MASK, Extra.ADVANTAGES, Extra.ROLLOUT_LOGPROBS)
    extras: dict[str, list[list[float]]] = {name: [] for name in names}
    for row in rows:
        prompt, rollout = row.prompt, row.rollout
        zeros = [0.0] * len(prompt.token_ids)
        sequences.append(TokenSequence((*prompt.token_ids, *rollout.token_ids), prompt.images))
        extras[Extra.LABEL_MASK].append(zeros + [1.0] * len(rollout.token_ids))
        extras[Extra.IMAGE_MASK].append(zeros + [float(bool(prompt.images))] * len(rollout.token_ids))
        extras[Extra.ON_POLICY_MASK].append([*zeros, *(float(drawn == version) for drawn in rollout.token_versions())])
        extras[Extra.ADVANTAGES].append([*zeros, *row.advantages])
        extras[Extra.ROLLOUT_LOGPROBS].append([*zeros, *rollout.logprobs])
        for name, values in _optional(row).items():
            extras.setdefault(name, []).append([*zeros, *values])
    batch = _collate_rows(sequences, extras, form, pack=True)
    kept_Q = torch.tensor([float(row.kept_tokens) for row in rows], dtype=torch.float32, device=form.device)
    return replace(batch, extras={**batch.extras, Extra.KEPT_TOKENS: kept_Q})


def _optional(row: ExperienceRow) -> dict[str, Sequence[float]]:
    values = {
        Extra.OLD_LOGPROBS: row.old_logprobs,
        Extra.REFERENCE_LOGPROBS: row.reference_logprobs,
        Extra.CORRECTION: row.weights,
    }
    return {name: given for name, given in values.items() if given is not None}


def supervised_batch(
    rows: Sequence[TokenSequence],
    label_masks: Sequence[Sequence[float]],
    *,
    form: BatchFormat,
    extras: Mapping[str, Sequence[Sequence[float]]] | None = None,
    pack: bool = False,
) -> Batch:
    """One micro-batch of demonstrations; ``label_mask`` is 1 on the tokens to learn. ``extras`` are per token too.

    With ``pack`` they follow one another in one row.
    """
    learnt = [float(len(row.token_ids)) if any(mask) else 0.0 for row, mask in zip(rows, label_masks, strict=True)]
    batch = _collate_rows(rows, {**(extras or {}), Extra.LABEL_MASK: label_masks}, form, pack=pack)
    learnt_Q = torch.tensor(learnt, dtype=torch.float32, device=form.device)
    return replace(batch, extras={**batch.extras, Extra.LEARNT_TOKENS: learnt_Q})


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
