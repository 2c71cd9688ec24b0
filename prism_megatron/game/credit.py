"""From the discriminator's scores to what every token of the policy's answers is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prism_megatron.advantages import GroupAdvantages, joint_advantages, per_expert_advantages
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.game.judge import Judgement
from prism_megatron.training.experience import Experience, ExperienceRow
from prism_megatron.types import PERCEPTION, REASONING, TOWERS, Rollout, RolloutGroup


@dataclass(frozen=True, eq=False)
class GroupCredit:
    """A group's advantages, and of which versions they are (a version is the steps played when a player last changed).

    ``discriminator_version`` judged; ``policy_versions[r]`` is the oldest policy that drew a token of rollout r.
    """

    advantages: GroupAdvantages
    discriminator_version: int
    policy_versions: tuple[int, ...]


def credit_groups(
    groups: Sequence[RolloutGroup], judgement: Judgement, game: GameConfig, *, seed: int, step: int, version: int
) -> list[GroupCredit]:
    """Advantages of every group, with the versions of who judged and who sampled."""
    return [
        GroupCredit(
            advantages=group_advantages(group, g, judgement, game, seed=seed, step=step),
            discriminator_version=version,
            policy_versions=tuple(rollout.policy_version for rollout in group.rollouts),
        )
        for g, group in enumerate(groups)
    ]


def group_advantages(
    group: RolloutGroup, index: int, judgement: Judgement, game: GameConfig, *, seed: int, step: int
) -> GroupAdvantages:
    """Advantages of one group from the scores of the discriminator before its update.

    A discriminator whose scores are not finite rewards nothing: no rollout counts as valid then.
    """
    valid_rollouts = np.array(group.valid_rollouts if judgement.finite else (), dtype=np.int64)
    owners = valid_rollouts
    if game.shuffle_scores:  # control: scores stay in the group but lose their owner
        owners = np.random.default_rng([seed, step, index]).permutation(valid_rollouts)
    valid_N = torch.zeros(len(group.rollouts), dtype=torch.bool)
    scores_T_N = torch.full((len(TOWERS), len(group.rollouts)), torch.nan, dtype=torch.float64)
    for rollout, owner in zip(valid_rollouts.tolist(), owners.tolist(), strict=True):
        valid_N[rollout] = True
        for tower in group.towers:
            scores_T_N[tower, rollout] = judgement.scores[index, tower, owner]
    if game.length_scores:  # control: what a discriminator that looks at nothing but length would say
        scores_T_N = length_scores(group)
    form = joint_advantages if game.advantage == "joint" else per_expert_advantages
    return form(
        scores_T_N[PERCEPTION],
        scores_T_N[REASONING] if REASONING in group.towers else None,
        valid_N,
        alpha=game.alpha,
        score_clip=game.score_clip,
        format_penalty=game.penalty,
        all_invalid=game.all_invalid_group,
        rounding=judgement.rounding,
    )


def length_scores(group: RolloutGroup) -> torch.Tensor:
    """Tokens of each judged segment over those of the longest in the group, ``[T, N]``; NaN where there is none."""
    lengths_T_N = torch.full((len(TOWERS), len(group.rollouts)), torch.nan, dtype=torch.float64)
    for rollout in group.valid_rollouts:
        for tower in group.towers:
            span = group.rollouts[rollout].segments.of_tower(tower)
            if span is not None:
                lengths_T_N[tower, rollout] = span.end - span.start
    return lengths_T_N / lengths_T_N.nan_to_num().amax(dim=1, keepdim=True).clamp(min=1.0)


def experience_of(
    groups: Sequence[RolloutGroup], credits_: Sequence[GroupCredit], game: GameConfig, *, version: int
) -> Experience:
    """What policy ``version`` learns from: every rollout with its credit.

    Without a valid rollout in the whole step there is no reward, unless groups without one are punished as the release
    does.
    """
    rows = [
        ExperienceRow(group.prompt, rollout, token_advantages(rollout, r, credit.advantages, game))
        for group, credit in zip(groups, credits_, strict=True)
        for r, rollout in enumerate(group.rollouts)
    ]
    rewarded = any(group.valid_rollouts for group in groups) or game.all_invalid_group == "release"
    return Experience(rows, version, rewarded=rewarded)


def token_advantages(rollout: Rollout, index: int, advantages: GroupAdvantages, game: GameConfig) -> list[float]:
    """One advantage per response token.

    ``response`` credit gives the mixed advantage to every token (the released way). ``segment`` credit gives the
    tokens up to the caption's end the perception advantage and the rest the reasoning advantage, or 0 where reasoning
    is not judged; a rollout without a caption has nothing to divide, and gets the mixed advantage.
    """
    length = len(rollout.token_ids)
    span = rollout.segments.perception
    if game.credit == "response" or span is None:
        return [float(advantages.mixed_N[index])] * length
    assert advantages.perception_N is not None, "credit per segment is refused with the joint form"
    caption = float(advantages.perception_N[index])
    rest = 0.0 if advantages.reasoning_N is None else float(advantages.reasoning_N[index])
    return [caption] * span.end + [rest] * (length - span.end)
