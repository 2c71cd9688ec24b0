"""What the discriminator's scores of a step say, tower by tower, as entries of its row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prism_megatron.data.loader import Example
from prism_megatron.data.render import Renderer
from prism_megatron.evaluation.health import Figures, JudgedGroup, agreement, tower_figures
from prism_megatron.evaluation.scenes import SceneJudgement, judge
from prism_megatron.stages.batches import PERCEPTION, REASONING, TOWER_NAMES, TOWERS
from prism_megatron.stages.judge import Judgement
from prism_megatron.types import PreferenceGroup

Truths = Sequence[Sequence[SceneJudgement] | None]
"""Per group one judgement for each rollout, or None where the truth is not known"""


def truths_of(examples: Sequence[Example], groups: Sequence[PreferenceGroup], renderer: Renderer) -> Truths:
    """How right every rollout is, for scenes; nothing is known of records."""
    return [
        None
        if example.scene is None
        else [judge(example.scene, renderer.decode(rollout.token_ids)) for rollout in group.rollouts]
        for example, group in zip(examples, groups, strict=True)
    ]


def game_row(groups: Sequence[PreferenceGroup], judgement: Judgement, truths: Truths) -> Figures:
    """Figures of both towers, how far they agree, and how even the load of their experts is.

    A caption is right that names every item, and reasoning that takes every step.
    """
    row: Figures = {"discriminator_loss": judgement.sums["discriminator_loss"]}
    for tower, name in zip(TOWERS, TOWER_NAMES, strict=True):
        judged = judged_groups(groups, judgement.scores, truths, tower)
        row |= {f"{name}/{figure}": value for figure, value in tower_figures(judged).items()}
    both = [g for g, group in enumerate(groups) if set(TOWERS) <= set(group.towers)]
    row |= agreement(*([_scores(groups[g], g, judgement.scores, tower) for g in both] for tower in TOWERS))
    return row | {name: value for name, value in judgement.sums.items() if "/expert_" in name}


def judged_groups(
    groups: Sequence[PreferenceGroup],
    scores: Mapping[tuple[int, int, int | None], float],
    truths: Truths,
    tower: int,
) -> list[JudgedGroup]:
    """What ``tower`` gave to each of the groups that it judges."""
    judged = []
    for g, (group, truth) in enumerate(zip(groups, truths, strict=True)):
        if tower not in group.towers:
            continue
        spans = [group.rollouts[r].segments.of_tower(tower) for r in group.valid_rollouts]
        judged.append(
            JudgedGroup(
                reference=scores[g, tower, None],
                rollouts=_scores(group, g, scores, tower),
                lengths=[span.end - span.start for span in spans if span is not None],
                right=None if truth is None else [is_right(truth[r], tower) for r in group.valid_rollouts],
            )
        )
    return judged


def is_right(truth: SceneJudgement, tower: int) -> bool:
    """Whether what the tower judges is exactly right."""
    return {PERCEPTION: truth.caption_exact, REASONING: truth.reasoning_exact}[tower]


def _scores(
    group: PreferenceGroup, index: int, scores: Mapping[tuple[int, int, int | None], float], tower: int
) -> list[float]:
    return [scores[index, tower, r] for r in group.valid_rollouts]
