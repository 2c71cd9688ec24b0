"""Made-up samples of a given size: what a step of a stage is played with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.training.experience import Experience, ExperienceRow
from prism_megatron.types import (
    ImageInput,
    PreferenceGroup,
    Prompt,
    Response,
    Rollout,
    Segments,
    Span,
    TokenSequence,
    VersionSpan,
)

TEXT_TOKEN = 5
END_TOKEN = 1
PAD_TOKEN = 0


@dataclass(frozen=True)
class Workload:
    """One step's samples. Example: ``Workload(prompts=2, rollouts=4)`` are eight answers to two prompts."""

    prompts: int = 2
    rollouts: int = 4
    """of each prompt; as many demonstrations, where none are drawn"""
    text_tokens: int = 64
    """of a prompt, beside its image"""
    image_grid: tuple[int, int, int] | None = (1, 16, 16)
    """frames, rows and columns of patches; None for no image"""
    answer_tokens: int = 128
    tokens_per_microbatch: int = 2048
    """token slots of a micro-batch at most"""
    share_prompts: bool = False


def prompts_of(shape: Qwen3VLShape, work: Workload) -> list[Prompt]:
    """Prompts with an image each, if there are images at all."""
    text = (TEXT_TOKEN,) * work.text_tokens
    if work.image_grid is None:
        return [Prompt(str(number), text, (), "") for number in range(work.prompts)]
    patches = int(np.prod(work.image_grid))
    visual = (shape.image_token_id,) * (patches // shape.vision.merge**2)
    tokens = (*visual, *text)
    return [
        Prompt(
            str(number),
            tokens,
            (ImageInput(np.zeros((patches, shape.vision.patch_dim), dtype=np.float32), work.image_grid),),
            "",
        )
        for number in range(work.prompts)
    ]


def demonstrations(shape: Qwen3VLShape, work: Workload) -> list[tuple[TokenSequence, list[float]]]:
    """Rows and their label masks."""
    answer = (TEXT_TOKEN,) * work.answer_tokens
    return [
        (
            TokenSequence((*prompt.token_ids, *answer), prompt.images),
            [0.0] * len(prompt.token_ids) + [1.0] * len(answer),
        )
        for prompt in prompts_of(shape, work)
        for _ in range(work.rollouts)
    ]


def experience(shape: Qwen3VLShape, work: Workload) -> Experience:
    """Rollouts of version 0 with an advantage for each token; prompts stand in one object, as stages have them."""
    drawn = _rollout(work)
    worth = [0.5] * work.answer_tokens
    rows = [ExperienceRow(prompt, drawn, worth) for prompt in prompts_of(shape, work) for _ in range(work.rollouts)]
    return Experience(rows, version=0)


def groups(shape: Qwen3VLShape, work: Workload) -> list[PreferenceGroup]:
    """Each prompt with a reference and rollouts, all valid."""
    drawn = _rollout(work)
    reference = Response(drawn.token_ids, drawn.segments)
    return [PreferenceGroup(prompt, reference, (drawn,) * work.rollouts) for prompt in prompts_of(shape, work)]


def _rollout(work: Workload) -> Rollout:
    length = work.answer_tokens
    segments = Segments(Span(0, length // 3), Span(length // 3, length), None)
    tokens = (TEXT_TOKEN,) * (length - 1) + (END_TOKEN,)
    return Rollout(tokens, (-1.0,) * length, "stop", (VersionSpan(0, 0, length),), segments)
