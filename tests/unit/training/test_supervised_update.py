"""The supervised step with a policy of one tensor: a mean over label tokens of all data-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from prism_megatron.engine.runtime import World
from prism_megatron.training import supervised_update
from prism_megatron.training.batches import supervised_batch
from prism_megatron.training.supervised_update import SFTUpdate, learn, teach
from prism_megatron.types import TokenSequence
from tests.unit.game.tiny_game import Bigram, form, world_of_one

ROWS = [(TokenSequence((5, 6, 7, 8)), [0.0, 0.0, 1.0, 1.0]), (TokenSequence((9, 10, 11)), [0.0, 1.0, 0.0])]
OTHER_RANKS_TOKENS = 5


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with world_of_one() as one:
        yield one


@pytest.mark.parametrize("rows_per_microbatch", [1, 2])
def test_the_loss_is_a_mean_over_the_label_tokens_of_all_ranks(
    world: World, rows_per_microbatch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: by hand, where another rank has five label tokens: its share of the step's loss, however rows are cut."""

    def with_another_rank(numbers: dict[str, float], **_: Any) -> dict[str, float]:
        return {name: number + OTHER_RANKS_TOKENS for name, number in numbers.items()}

    monkeypatch.setattr(supervised_update, "sum_numbers", with_another_rank)
    policy: Any = Bigram()
    logprobs = torch.log_softmax(policy.weight.detach().double(), dim=-1)
    expected = -(logprobs[6, 7] + logprobs[7, 8] + logprobs[9, 10]) / (3 + OTHER_RANKS_TOKENS)
    steps: list[SFTUpdate] = []
    teach(
        policy,
        lambda _step: ROWS,
        world=world,
        form=form(),
        rows_per_microbatch=rows_per_microbatch,
        steps=1,
        on_step=lambda _step, update: steps.append(update),
    )
    (step,) = steps
    assert step.loss == pytest.approx(float(expected), rel=1e-6)
    assert step.label_tokens == 3 + OTHER_RANKS_TOKENS
    assert len(policy.passes[0]) == 2 // rows_per_microbatch


def test_a_step_without_labels_changes_no_weight(world: World) -> None:
    """Claim: not even by momentum or decay; this policy's optimizer decays weights whenever it steps."""
    policy: Any = Bigram()
    before = policy.weight.detach().clone()
    row, mask = ROWS[0]
    update = learn(policy, [supervised_batch([row], [[0.0] * len(mask)], form=form())], world=world)
    assert update.label_tokens == 0 and not update.result.updated
    assert torch.equal(policy.weight, before)
