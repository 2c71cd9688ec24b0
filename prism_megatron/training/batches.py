"""From rows of tokens to micro-batches. No model here.

Shape suffixes: B rows, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from prism_megatron.engine.batch import Batch, Extra, collate
from prism_megatron.training.experience import ExperienceRow
from prism_megatron.types import TokenSequence


@dataclass(frozen=True)
class BatchFormat:
    """How rows become tensors: the model's pad and end tokens, the layout's length multiple, the device.

    ``unseen_token_ids`` are tokens of the prompt that the discriminator is not shown, its images with them: those that
    stand for a picture, or around one, under ``--modality text``. ``share_prompts`` has a prompt read once for all that
    goes on from it, the policy's answers and the segments that one tower of the discriminator judges, which is exact:
    no token sees what follows it.
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
    """A micro-batch, and which of the experience's rows its sequences are, by number."""

    rows: tuple[int | None, ...]
    """None for a prompt that answers go on from"""
    batch: Batch


@dataclass(frozen=True)
class _Sequence:
    """What of a row, or of a prompt that rows share, is one sequence of a micro-batch."""

    tokens: TokenSequence
    row: int | None
    """number of the row; None for a prompt"""
    shown: int
    """tokens before the answer's first"""
    prefix: int | None = None


def _sequences(rows: Sequence[ExperienceRow], form: BatchFormat) -> list[_Sequence]:
    """The rows, each with its prompt; with ``share_prompts`` neighbours of one prompt behind a single one.

    An answer's first token is predicted from the prompt's last one, which therefore begins every answer's sequence; an
    image never stands there.
    """
    laid_out: list[_Sequence] = []
    for _, neighbours in groupby(enumerate(rows), key=lambda one: id(one[1].prompt)):
        same = list(neighbours)
        prompt = same[0][1].prompt
        cut, images, prefix = 0, prompt.images, None
        if form.share_prompts and len(same) > 1 and len(prompt.token_ids) > 1:
            cut, images, prefix = len(prompt.token_ids) - 1, (), len(laid_out)
            laid_out.append(_Sequence(TokenSequence(prompt.token_ids[:cut], prompt.images), None, cut))
        for number, row in same:
            tokens = TokenSequence((*prompt.token_ids[cut:], *row.rollout.token_ids), images)
            laid_out.append(_Sequence(tokens, number, len(prompt.token_ids) - cut, prefix))
    return laid_out


def planned_batch(
    numbers: Sequence[int], rows: Sequence[ExperienceRow], *, version: int, form: BatchFormat
) -> PlannedBatch:
    """:func:`policy_batch` of those of ``rows`` that have these numbers; of none, a short one nobody learns from."""
    if not numbers:
        shortest = min(rows, key=lambda row: len(row.prompt.token_ids) + len(row.rollout.token_ids))
        return PlannedBatch((None,), policy_batch([shortest], version=version, form=form, learnt=False))
    own = [rows[number] for number in numbers]
    laid_out = _sequences(own, form)
    return PlannedBatch(
        tuple(None if one.row is None else numbers[one.row] for one in laid_out),
        policy_batch(own, version=version, form=form),
    )


def policy_batch(rows: Sequence[ExperienceRow], *, version: int, form: BatchFormat, learnt: bool = True) -> Batch:
    """One packed micro-batch of prompts with a rollout each, or with all that follow them where prompts are shared.

    Token extras stand at the position of the *label* token:
    ``label_mask`` 1 on response tokens, ``image_mask`` the same for prompts with images only, ``on_policy_mask`` the
    same for tokens drawn with ``version`` of the policy only, ``advantages``, and ``rollout_logprobs`` as the rollout
    engine drew them. ``old_logprobs``, ``reference_logprobs`` and ``correction`` are there where the rows have them,
    all or none; ``kept_tokens`` counts a sequence's. Of a shared prompt all of them are 0, and so are the masks of rows
    that are not ``learnt``.
    """
    laid_out = _sequences(rows, form)
    names = (Extra.LABEL_MASK, Extra.IMAGE_MASK, Extra.ON_POLICY_MASK, Extra.ADVANTAGES, Extra.ROLLOUT_LOGPROBS)
    extras: dict[str, list[list[float]]] = {name: [] for name in names}
    for name in () if not rows else _optional(rows[0]):
        extras[name] = []
    for one in laid_out:
        zeros = [0.0] * one.shown
        if one.row is None:
            for values in extras.values():
                values.append(zeros)
            continue
        row = rows[one.row]
        prompt, rollout = row.prompt, row.rollout
        extras[Extra.LABEL_MASK].append(zeros + [float(learnt)] * len(rollout.token_ids))
        shows = float(learnt and bool(prompt.images))
        extras[Extra.IMAGE_MASK].append(zeros + [shows] * len(rollout.token_ids))
        extras[Extra.ON_POLICY_MASK].append(
            [*zeros, *(float(learnt and drawn == version) for drawn in rollout.token_versions())]
        )
        extras[Extra.ADVANTAGES].append([*zeros, *row.advantages])
        extras[Extra.ROLLOUT_LOGPROBS].append([*zeros, *rollout.logprobs])
        for name, given in _optional(row).items():
            extras[name].append([*zeros, *given])
    batch = collate(
        [one.tokens for one in laid_out],
        pad_token_id=form.pad_token_id,
        multiple_of=form.length_multiple,
        device=form.device,
        pack=True,
        prefixes=[one.prefix for one in laid_out] if any(one.row is None for one in laid_out) else (),
        token_extras=extras,
    )
    kept = [0.0 if one.row is None else float(learnt * rows[one.row].kept_tokens) for one in laid_out]
    kept_Q = torch.tensor(kept, dtype=torch.float32, device=form.device)
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
