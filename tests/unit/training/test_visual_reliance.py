"""Means over tokens by hand, and a prompt that has nothing to hide.

Blind to the model: ``tests/distributed/test_visual_reliance.py`` has it beside transformers and over layouts.
"""

from __future__ import annotations

from typing import Any

import pytest

from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.training.policy_update import UpdatePlan
from prism_megatron.training.visual_reliance import Asked, Likelihood, likelihoods, summary_of
from prism_megatron.types import Prompt
from tests.unit.game.tiny_game import form, response, world_of_one


def test_means_are_over_tokens() -> None:
    """By hand: 10 and 30 tokens, of which the first owe 1 nat each and the others none."""
    found = summary_of([Likelihood(10, -2.0, -12.0), Likelihood(30, -6.0, -6.0)] * 50, seed=0)
    assert (found.responses, found.tokens) == (100, 2000)
    assert (found.seen, found.blank) == pytest.approx((-0.2, -0.45), abs=1e-12)
    assert found.difference.mean == pytest.approx(0.25, abs=1e-12)
    assert 0.15 < found.difference.low < 0.25 < found.difference.high < 0.35


def test_a_prompt_without_an_image_is_refused() -> None:
    bare, no_policy = Asked(Prompt("p", (1, 2), (), "?"), response([3])), None
    asked: Any = [bare]
    with world_of_one() as world, pytest.raises(ValueError, match="prompt 'p' has no image to leave out"):
        likelihoods(no_policy, asked, UpdatePlan(PolicyObjective(), form(), 64), world=world)  # type: ignore[arg-type]
