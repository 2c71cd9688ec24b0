"""Two groups whose answers and advantages are given, and an update of the policy by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from prism_megatron.advantages import GroupAdvantages
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.game.credit import GroupCredit, experience_of
from prism_megatron.training.batches import BatchFormat
from prism_megatron.training.experience import Experience
from prism_megatron.training.policy_update import UpdatePlan
from prism_megatron.types import VersionSpan
from tests.unit.game.tiny_game import form, group, image, invalid, response, rollout

MIXED = [VersionSpan(3, 0, 2), VersionSpan(4, 2, 4)]
GROUPS = [
    group(
        response([8, 9], [10]),
        rollout([11, 12, 13], [14, 15], versions=[VersionSpan(4, 0, 6)], logprobs=[-2.0, -3.0, -1.5, -4.0, -2.5, -3.5]),
        rollout([16], [17, 18], versions=MIXED, logprobs=[-3.0, -3.1, -3.2, -3.3]),
        prompt=(5, 6),
        images=[image()],
    ),
    group(
        response([19], [20]),
        invalid(21, 22),
        rollout([23], [24], versions=[VersionSpan(4, 0, 3)], logprobs=[-4.0, -30.0, -2.0]),
        prompt=(7, 4, 7, 4),
    ),
]
ADVANTAGES = [[0.5, -1.25], [-2.0, 0.75]]
NUM_TOKENS = 6 + 4 + 2 + 3
TEMPERATURE = 0.5
GAME = GameConfig()


def learning(
    *, budget: int = 10, own: BatchFormat | None = None, objective: PolicyObjective | None = None
) -> UpdatePlan:
    return UpdatePlan(objective or PolicyObjective(), own or form(), budget, TEMPERATURE)


def credits_of(advantages: Sequence[GroupAdvantages]) -> list[GroupCredit]:
    return [GroupCredit(own, 0, ()) for own in advantages]


def given_credits() -> list[GroupCredit]:
    return credits_of([GroupAdvantages(torch.tensor(own), None, None, 2, 0, 0) for own in ADVANTAGES])


def given(game: GameConfig = GAME) -> Experience:
    return experience_of(GROUPS, given_credits(), game, version=4)


def responses() -> Iterator[tuple[int, int, int, int, int]]:
    """Group, rollout, place, token and the token before it, of every token of every answer."""
    for g, own in enumerate(GROUPS):
        for r, answer in enumerate(own.rollouts):
            tokens = (*own.prompt.token_ids, *answer.token_ids)
            start = len(own.prompt.token_ids)
            for place in range(len(answer.token_ids)):
                yield g, r, place, tokens[start + place], tokens[start + place - 1]
