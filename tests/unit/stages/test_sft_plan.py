"""When the held-out part of supervised fine-tuning is asked, and which of its steps may be the best one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prism_megatron.engine.batch import Extra
from prism_megatron.stages.sft.demonstrations import Row
from prism_megatron.stages.sft.plan import Learner
from prism_megatron.stages.sft.rows import best_of
from prism_megatron.training.batches import BatchFormat
from prism_megatron.types import TokenSequence

PAD = 9


def learner(*, eval_every: int, save_every: int) -> Learner:
    nobody: Any = None
    return Learner(nobody, nobody, row_tokens=None, rows_per_microbatch=1, eval_every=eval_every,
                   save_every=save_every, eval_rows=1)  # fmt: skip


@pytest.mark.parametrize(
    ("eval_every", "save_every", "asked", "kept"),
    [
        (2, 3, [1, 2, 3, 5, 6], [2, 5, 6]),  # steps count from 0, and the last of 7 is always asked
        (0, 3, [6], [2, 5, 6]),
        (4, 100, [3, 6], [6]),
    ],
)
def test_every_checkpoint_has_a_held_out_loss(
    eval_every: int, save_every: int, asked: list[int], kept: list[int]
) -> None:
    """Claim: asked every so many steps, before each checkpoint and at the end; 0 asks at the end alone."""
    made = learner(eval_every=eval_every, save_every=save_every)
    assert [step for step in range(7) if made.asks_after(step, 7)] == asked
    assert [step for step in range(7) if made.may_be_best(step, 7)] == kept


def test_the_best_is_the_lowest_that_was_asked() -> None:
    best, found = None, []
    for loss in (2.0, None, 1.5, 1.5, 1.7, 1.4):
        best, is_best = best_of(best, {} if loss is None else {"held_out/loss": loss})
        found.append(is_best)
    assert (best, found) == (1.4, [True, False, True, False, False, True])


def test_a_packed_row_is_one_row() -> None:
    """Claim: its conversations follow one another with their labels and sources; rounds are filled without labels."""
    policy: Any = SimpleNamespace(world=SimpleNamespace(microbatch_rounds=2))
    form = BatchFormat(pad_token_id=PAD, end_token_id=8, length_multiple=1, device=torch.device("cpu"))
    made = Learner(policy, form, row_tokens=8, rows_per_microbatch=1, eval_every=0, save_every=1, eval_rows=1)
    row = Row(((TokenSequence((1, 2, 3)), [0.0, 1.0, 1.0]), (TokenSequence((4, 5)), [0.0, 1.0])), (7, 3))
    first, filler = made.batches([row])
    assert first.input_ids_B_S.tolist() == [[1, 2, 3, 4, 5]]
    assert first.extras[Extra.LABEL_MASK].tolist() == [[0, 1, 1, 0, 1]]
    assert first.extras[Extra.SOURCE].tolist() == [[7, 7, 7, 3, 3]]
    assert filler.extras[Extra.LABEL_MASK].sum() == 0 and filler.input_ids_B_S.unique().tolist() == [PAD]
