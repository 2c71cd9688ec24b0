"""How right a response about a scene is: perception and reasoning measured apart, from the known truth.

Counts stand beside shares, so that a set of responses can be pooled instead of averaging shares.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prism_megatron.data.scenes import Kind, Scene
from prism_megatron.data.segments import parse_response
from prism_megatron.data.teachers import required_steps
from prism_megatron.data.tokenizer import END_TOKEN

_ITEM = re.compile(r"- ([a-z]{1,20}) ([a-z]{1,20}): ([0-9]{1,3})")


@dataclass(frozen=True)
class SceneJudgement:
    """One judged response. Shares without data are None.

    ``items_right``: caption lines naming a kind of the scene with its count, each kind once.
    ``steps_right``: required reasoning lines that are there, word for word; ``num_steps`` is the larger of the lines
    required and the lines written, so that skipping and padding both cost.
    """

    format_valid: bool
    num_items: int
    items_right: int
    items_in_scene: int
    caption_exact: bool
    num_steps: int
    steps_right: int
    reasoning_exact: bool
    answer_right: bool

    @property
    def item_precision(self) -> float | None:
        return self.items_right / self.num_items if self.num_items else None

    @property
    def item_recall(self) -> float:
        return self.items_right / self.items_in_scene

    @property
    def step_validity(self) -> float:
        return self.steps_right / self.num_steps


def judge(scene: Scene, response_text: str) -> SceneJudgement:
    """Judge any text against ``scene``. A response of invalid format has no items, no steps and no answer.

    One end token at the end of the text is allowed and ignored; the format rule is that of ``data.segments``.
    """
    parsed = parse_response(response_text.removesuffix(END_TOKEN).encode("utf-8", errors="replace"))
    required = required_steps(scene)
    if isinstance(parsed, str):
        return SceneJudgement(
            format_valid=False,
            num_items=0,
            items_right=0,
            items_in_scene=len(scene.counts),
            caption_exact=False,
            num_steps=len(required),
            steps_right=0,
            reasoning_exact=False,
            answer_right=False,
        )
    lines = _lines(parsed.caption)
    items_right = len({item for line in lines if (item := _item(line)) in scene.counts})
    steps = _lines(parsed.think)
    answer_right = parsed.answer.strip().lower() == scene.answer
    return SceneJudgement(
        format_valid=True,
        num_items=len(lines),
        items_right=items_right,
        items_in_scene=len(scene.counts),
        caption_exact=items_right == len(lines) == len(scene.counts),
        num_steps=max(len(required), len(steps)),
        steps_right=len(set(required) & set(steps)),
        reasoning_exact=answer_right and tuple(steps) == required,
        answer_right=answer_right,
    )


def _lines(body: str) -> list[str]:
    return [line.strip() for line in body.splitlines() if line.strip()]


def _item(line: str) -> tuple[Kind, int] | None:
    match = _ITEM.fullmatch(line)
    return (Kind(match[1], match[2]), int(match[3])) if match else None


def item_accuracy(judgement: SceneJudgement) -> float:
    """Right caption items over the larger of items written and items in the scene: omitting and padding both cost."""
    return judgement.items_right / max(judgement.num_items, judgement.items_in_scene)
