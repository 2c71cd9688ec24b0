"""From rewards to an advantage for every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_megatron.advantages import overlong_penalty, reward_advantages
from prism_megatron.config.stages.algorithms import AdvantageForm
from prism_megatron.stages.rlvr.prospect import RewardedGroup
from prism_megatron.training.experience import Experience, ExperienceRow

LENGTH = "length"
"""The component that a long answer loses by."""


@dataclass(frozen=True)
class Crediting:
    """How rewards become advantages."""

    advantage: AdvantageForm
    longest: int
    """tokens of the longest answer that is sampled"""
    overlong_buffer: int
    """tokens before it over which an answer loses; 0 for none"""
    overlong_factor: float

    def components(self, one: RewardedGroup) -> tuple[dict[str, float], Tensor]:
        """The weight of each component of the reward, and its values ``[K, N]``."""
        weights = dict(one.rewards[0].reward.weights)
        values = [[found.reward.components[name] for found in one.rewards] for name in weights]
        if self.overlong_buffer:
            weights[LENGTH] = 1.0
            values.append([self._length(len(rollout.token_ids)) for rollout in one.group.rollouts])
        return weights, torch.tensor(values, dtype=torch.float64)

    def _length(self, tokens: int) -> float:
        return overlong_penalty(tokens, longest=self.longest, buffer=self.overlong_buffer, factor=self.overlong_factor)

    def experience(self, groups: Sequence[RewardedGroup], *, version: int) -> tuple[Experience, list[list[float]]]:
        """What policy ``version`` learns from, each token by the advantage of its answer; and the rewards by group."""
        if not groups:
            return Experience([], version, rewarded=False), []
        found = [self.components(one) for one in groups]
        weights = found[0][0]
        advantages = reward_advantages(
            [values_K_N for _, values_K_N in found], list(weights.values()), form=self.advantage
        )
        rows = [
            ExperienceRow(one.group.prompt, rollout, [float(advantage)] * len(rollout.token_ids))
            for one, advantages_N in zip(groups, advantages, strict=True)
            for rollout, advantage in zip(one.group.rollouts, advantages_N, strict=True)
        ]
        total_K = torch.tensor(list(weights.values()), dtype=torch.float64)
        rewards = [(total_K @ values_K_N).tolist() for _, values_K_N in found]
        return Experience(rows, version, rewarded=any(any(row.advantages) for row in rows)), rewards
