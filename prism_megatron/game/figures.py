"""What the discriminator's scores of a step say, tower by tower, as entries of its row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prism_megatron.data.loader import Example
from prism_megatron.data.render import Renderer
from prism_megatron.evaluation.health import Figures, JudgedGroup, agreement, tower_figures
from prism_megatron.evaluation.scenes import SceneJudgement, judge
from prism_megatron.game.judge import Judgement
from prism_megatron.game.scoring_plan import TrunkCost
from prism_megatron.types import TOWER_NAMES, TOWERS, PreferenceGroup

Truths = Sequence[Sequence[SceneJudgement] | None]
"""Per group one judgement for each rollout, or None where the truth is not known"""
Right = tuple[bool | None, bool | None]
"""Whether what each tower judges is right; None where nobody knows"""
Rights = Sequence[Sequence[Right] | None]
"""Per group one entry for each rollout, or None where nothing is known of any"""


def truths_of(examples: Sequence[Example], groups: Sequence[PreferenceGroup], renderer: Renderer) -> Truths:
    """How right every rollout is, for scenes; nothing is known of records."""
    return [
        None
        if example.scene is None
        else [judge(example.scene, renderer.decode(rollout.token_ids)) for rollout in group.rollouts]
        for example, group in zip(examples, groups, strict=True)
    ]


def rights_of(examples: Sequence[Example], groups: Sequence[PreferenceGroup], renderer: Renderer) -> Rights:
    """Which rollouts are right, for the AUC within groups."""
    return [
        [is_right(example, renderer.decode(rollout.token_ids[:-1]), renderer) for rollout in group.rollouts]
        for example, group in zip(examples, groups, strict=True)
    ]


def is_right(example: Example, text: str, renderer: Renderer) -> Right:
    """Of a response's text, without its end token.

    Of a scene a caption is right that names every item exactly, and reasoning that takes every step. Of a record the
    answer is known, so that reasoning is right which ends in it, letter case aside; nobody knows about its caption.
    """
    if example.scene is not None:
        truth = judge(example.scene, text)
        return truth.caption_exact, truth.reasoning_exact
    parsed = renderer.segment_finder.parse(text.encode())
    if example.record is None or isinstance(parsed, str):
        return None, None
    return None, parsed.answer.strip().casefold() == example.record.answer.strip().casefold()


def game_row(groups: Sequence[PreferenceGroup], judgement: Judgement, rights: Rights) -> Figures:
    """Figures of both towers, how far they agree, and how even the load of their experts is."""
    row: Figures = {"discriminator_loss": judgement.sums["discriminator_loss"]}
    for tower, name in zip(TOWERS, TOWER_NAMES, strict=True):
        judged = judged_groups(groups, judgement.scores, rights, tower)
        row |= {f"{name}/{figure}": value for figure, value in tower_figures(judged).items()}
    both = [g for g, group in enumerate(groups) if set(TOWERS) <= set(group.towers)]
    row |= agreement(*([_scores(groups[g], g, judgement.scores, tower) for g in both] for tower in TOWERS))
    return row | {name: value for name, value in judgement.sums.items() if "/expert_" in name}


def judged_groups(
    groups: Sequence[PreferenceGroup],
    scores: Mapping[tuple[int, int, int | None], float],
    rights: Rights,
    tower: int,
) -> list[JudgedGroup]:
    """What ``tower`` gave to each of the groups that it judges."""
    judged = []
    for g, (group, known) in enumerate(zip(groups, rights, strict=True)):
        if tower not in group.towers:
            continue
        right = [] if known is None else [known[r][tower] for r in group.valid_rollouts]
        spans = [group.rollouts[r].segments.of_tower(tower) for r in group.valid_rollouts]
        judged.append(
            JudgedGroup(
                reference=scores[g, tower, None],
                rollouts=_scores(group, g, scores, tower),
                lengths=[span.end - span.start for span in spans if span is not None],
                right=None if known is None or None in right else [one is True for one in right],
            )
        )
    return judged


def _scores(
    group: PreferenceGroup, index: int, scores: Mapping[tuple[int, int, int | None], float], tower: int
) -> list[float]:
    return [scores[index, tower, r] for r in group.valid_rollouts]


def cost_row(cost: TrunkCost) -> Figures:
    """What the discriminator's pass ran, and which way references were run."""
    return {
        "discriminator/trunk_tokens": cost.trunk_tokens,
        "discriminator/unique_tokens": cost.unique_tokens,
        "discriminator/pass_overhead": cost.overhead,
        "discriminator/rollouts_per_reference": cost.rollouts / cost.references,
        "discriminator/references_apart": int(cost.apart),
    }
