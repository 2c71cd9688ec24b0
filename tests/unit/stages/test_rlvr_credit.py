"""Rewards and advantages of a step, by hand."""

from __future__ import annotations

import pytest
import torch

from prism_megatron.config.stages.algorithms import AdvantageForm
from prism_megatron.stages.rlvr.credit import Crediting
from tests.unit.stages.tiny_rewards import group


def crediting(form: AdvantageForm = "group", *, buffer: int = 0, factor: float = 1.0) -> Crediting:
    return Crediting(form, longest=10, overlong_buffer=buffer, overlong_factor=factor)


def test_every_token_has_the_advantage_of_its_answer() -> None:
    """Claim: rewards 1 and 0.2 have mean 0.6 and unbiased deviation 0.5657, so that advantages are ±0.7071."""
    experience, rewards = crediting().experience([group([True, False], lengths=[2, 3])], version=5)
    assert rewards == [[1.0, 0.2]]
    assert experience.version == 5 and experience.rewarded
    first, second = (list(row.advantages) for row in experience.rows)
    assert first == pytest.approx([0.8 / 2**0.5 / 0.8] * 2, rel=1e-5)
    assert second == pytest.approx([-(0.5**0.5)] * 3, rel=1e-5)


def test_the_mean_alone_may_be_taken() -> None:
    experience, _ = crediting("group-mean").experience([group([True, False, False, False])], version=0)
    assert [row.advantages[0] for row in experience.rows] == pytest.approx([0.6, -0.2, -0.2, -0.2])


def test_groups_without_contrast_teach_nothing() -> None:
    experience, _ = crediting().experience([group([True, True]), group([False, False])], version=0)
    assert not experience.rewarded and all(not any(row.advantages) for row in experience.rows)
    assert not crediting().experience([], version=0)[0].rewarded


def test_a_long_answer_loses_over_the_buffer() -> None:
    """Claim: of 10 tokens at most with a buffer of 4, 6 lose nothing, 8 half and 10 all of the factor."""
    one = group([True, True, True], lengths=[6, 8, 10])
    weights, values_K_N = crediting(buffer=4, factor=2.0).components(one)
    assert weights == {"accuracy": 0.8, "format": 0.2, "length": 1.0}
    assert torch.equal(values_K_N[2], torch.tensor([0.0, -1.0, -2.0], dtype=torch.float64))
    _, rewards = crediting(buffer=4, factor=2.0).experience([one], version=0)
    assert rewards == [[1.0, 0.0, -1.0]]


def test_gdpo_normalises_every_reward_by_itself() -> None:
    """Claim: lengths differ where accuracy does not, and count as much; the sum is whitened over the step."""
    experience, _ = crediting("gdpo", buffer=4).experience(
        [group([True, True], lengths=[6, 10]), group([True, False], lengths=[6, 6])], version=0
    )
    advantages = torch.tensor([row.advantages[0] for row in experience.rows], dtype=torch.float64)
    # By the length 1.0 * 0.7071, by accuracy 0.8 * 0.7071: before whitening (0.7071, -0.7071, 0.5657, -0.5657).
    raw = torch.tensor([1.0, -1.0, 0.8, -0.8], dtype=torch.float64) / 2**0.5
    assert torch.allclose(advantages, raw / raw.std(), rtol=1e-5)
