"""Answers of a step as the report shows them, with the scores that both towers gave."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from prism_megatron.data.loader import Example
from prism_megatron.data.pictures.files import open_image
from prism_megatron.data.render import Renderer
from prism_megatron.evaluation.sample import MAX_SAMPLES, Sample, png_url
from prism_megatron.game.judge import Judgement
from prism_megatron.types import TOWER_NAMES, TOWERS, PreferenceGroup


def game_samples(
    examples: Sequence[Example],
    groups: Sequence[PreferenceGroup],
    judgement: Judgement,
    renderer: Renderer,
    *,
    count: int = MAX_SAMPLES,
) -> list[Sample]:
    """The first answer of the first ``count`` groups, with the scores of before the step's update.

    ``examples`` are what the groups were sampled for; there are none, and no pictures, for pairs read from a file.
    """
    samples: list[Sample] = []
    for g, group in enumerate(groups[:count]):
        answer, scores = group.rollouts[0], judgement.scores
        samples.append(
            Sample(
                images=[png_url(image_of(examples[g]))] if examples else [],
                prompt=group.prompt.question,
                response=renderer.decode(answer.token_ids),
                reference=renderer.decode(group.reference.token_ids),
                problem=answer.segments.problem,
                scores={name: scores.get((g, t, 0)) for t, name in zip(TOWERS, TOWER_NAMES, strict=True)},
                reference_scores={name: scores.get((g, t, None)) for t, name in zip(TOWERS, TOWER_NAMES, strict=True)},
            )
        )
    return samples


def image_of(example: Example) -> Image.Image:
    """The picture a prompt shows, as its source has it."""
    if example.scene is not None:
        return example.scene.image()
    assert example.record is not None, "an example comes from a scene or from a record"
    return open_image(example.record.image)
