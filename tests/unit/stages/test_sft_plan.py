"""When the held-out part of supervised fine-tuning is asked, and which of its steps may be the best one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prism_megatron.engine.batch import Extra
from prism_megatron.engine.provider import StepResult
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.health import Figures
from prism_megatron.stages.sft.demonstrations import Row, StepRows
from prism_megatron.stages.sft.plan import Learner
from prism_megatron.stages.sft.rows import Best, SFTStep, best_of, step_row
from prism_megatron.training.batches import BatchFormat
from prism_megatron.training.supervised_update import SFTUpdate
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


def asked(loss: float, *, tokens: int = 10) -> Figures:
    return {"held_out/loss": loss, "held_out/tokens": tokens}


def test_the_best_is_the_lowest_that_was_asked() -> None:
    best, found = None, []
    for loss in (2.0, None, 1.5, 1.5, 1.7, 1.4):
        best, is_best = best_of(best, {} if loss is None else asked(loss), digest="a")
        found.append(is_best)
    assert (best, found) == (Best(1.4, 10, "a"), [True, False, True, False, False, True])


def test_losses_of_other_held_out_rows_are_not_compared() -> None:
    """Claim: after a resume with more --eval-rows, or another held-out part, the first loss is the best anew."""
    best = Best(1.4, 10, "a")
    assert best_of(best, asked(1.6), digest="a") == (best, False)
    assert best_of(best, asked(1.6, tokens=20), digest="a") == (Best(1.6, 20, "a"), True)
    assert best_of(best, asked(1.6), digest="b") == (Best(1.6, 10, "b"), True)


def test_what_could_not_be_read_of_the_held_out_part_is_said() -> None:
    row = Row(((TokenSequence((1, 2)), [0.0, 1.0]),), (0,))
    steps = [StepRows((row,), 1, skipped, {}) for skipped in (("line 3 is bad",), ("line 9 is bad",), ("never read",))]
    held_out: Any = SimpleNamespace(steps=lambda _after: iter(steps))
    policy: Any = SimpleNamespace(world=SimpleNamespace(microbatch_rounds=1, dp_size=1))
    form = BatchFormat(pad_token_id=PAD, end_token_id=8, length_multiple=1, device=torch.device("cpu"))
    made = Learner(policy, form, row_tokens=8, rows_per_microbatch=1, eval_every=0, save_every=1, eval_rows=2)
    said: list[str] = []
    assert len(made.asked(held_out, say=said.append)) == 2
    assert said == ["held out, but not asked: line 3 is bad", "held out, but not asked: line 9 is bad"]


def test_rows_that_fill_up_are_counted_nowhere(world: World) -> None:
    """Claim: 3 tokens of one row that was read, of two; the fill is that of both."""
    read = Row(((TokenSequence((1, 2, 3)), [0.0, 1.0, 1.0]),), (0,))
    fills = Row(((TokenSequence((PAD,) * 5), [0.0] * 5),), (0,), fills=True)
    update = SFTUpdate(loss=1.0, label_tokens=2, result=StepResult(1.0, 0.1, updated=True))
    nobody: Any = SimpleNamespace(vision_cache=None)
    made = Learner(nobody, nobody, row_tokens=6, rows_per_microbatch=1, eval_every=0, save_every=1, eval_rows=1)
    row = step_row(
        SFTStep(0, StepRows((read, fills), 1, ("line 3 is bad",), {}), update, None), learner=made, world=world
    )
    assert (row["tokens"], row["samples"], row["skipped_samples"], row["row_fill"]) == (3, 1, 1, 3 / 12)


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
    assert (
        not row.fills and filler.extras[Extra.LABEL_MASK].sum() == 0 and filler.input_ids_B_S.unique().tolist() == [PAD]
    )
