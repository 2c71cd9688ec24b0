"""Within-group AUC of a step's scores: does the discriminator rank right answers above wrong ones of one prompt?

What is right is known of scenes, in both towers, and of a record's final answer; of a record's caption it is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prism_megatron.data.loader import Example
from prism_megatron.data.render import Renderer
from prism_megatron.data.segments import TaggedText
from prism_megatron.evaluation.auc import AUC, within_group_auc
from prism_megatron.evaluation.scenes import judge
from prism_megatron.stages.batches import TOWERS
from prism_megatron.types import PreferenceGroup

Scores = Mapping[tuple[int, int, int | None], float]


def group_auc(
    examples: Sequence[Example], groups: Sequence[PreferenceGroup], scores: Scores, renderer: Renderer
) -> list[AUC]:
    """Of each tower, over the valid rollouts whose rightness is known; ``scores`` are those of a ``Judgement``."""
    scored: list[list[list[tuple[float, bool]]]] = [[] for _ in TOWERS]
    for g, (example, group) in enumerate(zip(examples, groups, strict=True)):
        truths = {r: is_right(example, renderer.decode(group.rollouts[r].token_ids[:-1]), renderer)
                  for r in group.valid_rollouts}  # fmt: skip
        for tower in group.towers:
            own = ((scores[g, tower, r], truth[tower]) for r, truth in truths.items())
            scored[tower].append([(score, right) for score, right in own if right is not None])
    return [within_group_auc(own) for own in scored]


def is_right(example: Example, text: str, renderer: Renderer) -> tuple[bool | None, bool | None]:
    """Whether a valid response's caption and its reasoning are right, by tower; None where nobody knows.

    A scene's reasoning is right if every step is; a record's if its answer is the record's, letter case aside.
    """
    if example.scene is not None:
        truth = judge(example.scene, text)
        return truth.caption_exact, truth.reasoning_exact
    parsed = renderer.segment_finder.parse(text.encode())
    if example.record is None or not isinstance(parsed, TaggedText):
        return None, None
    return None, parsed.answer.strip().casefold() == example.record.answer.strip().casefold()
