"""Run on every rank: one step of supervised fine-tuning on the same demonstrations, packed or padded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.loader import SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.stream.prefetch import Demonstration
from prism_megatron.engine.runtime import World
from prism_megatron.stages.sft.demonstrations import Row
from prism_megatron.stages.sft.plan import Learner
from prism_megatron.training.roles import batch_format, build_policy
from prism_megatron.training.supervised_update import learn
from prism_megatron.types import TokenSequence

FOLDER = MINI_FOLDER / "base"
NUM_DEMONSTRATIONS = 16
TEXT_ONLY = 5
"""Of them, those whose image is left out."""


class StepGradients(NamedTuple):
    """Of one step: mean loss a label token, label tokens, and the gradients by Hugging Face name, before clipping."""

    loss: float
    label_tokens: int
    gradients: dict[str, Tensor]


def step_gradients(world: World, per_row: int) -> StepGradients:
    """``per_row`` demonstrations to a packed row; 0 pads them, two rows to a micro-batch. Nothing is frozen."""
    renderer = Renderer.from_folder(FOLDER)
    policy = build_policy(FOLDER, Qwen3VLShape.from_folder(FOLDER), world=world, dtype=torch.float32,
                          optimizer=OptimizerConfig(lr=0.0), total_steps=1, freeze=())  # fmt: skip
    form = batch_format(renderer, world)
    learner = Learner(policy, form, row_tokens=512 if per_row else None, rows_per_microbatch=1 if per_row else 2,
                      eval_every=0, save_every=1, eval_rows=1)  # fmt: skip
    rows = [Row(tuple(some), (0,) * len(some)) for some in _split(demonstrations(renderer), per_row or 1)]
    update = learn(policy, learner.batches(rows[world.dp_rank :: world.dp_size]), world=world)
    gradients = {name: gradient.clone() for name, gradient in policy.export_gradients()}
    return StepGradients(update.loss, update.label_tokens, gradients)


def demonstrations(renderer: Renderer) -> list[Demonstration]:
    """Answers about scenes, of unequal lengths, some without their image."""
    scenes = SceneSource(renderer, split="sft", seed=3, batch_size=NUM_DEMONSTRATIONS, teacher="sloppy")
    made = [renderer.training_row(example.prompt, example.reference) for example in scenes.batch(0)]
    return [_without_image(one, renderer) if number % TEXT_ONLY == 0 else one for number, one in enumerate(made)]


def _without_image(demonstration: Demonstration, renderer: Renderer) -> Demonstration:
    sequence, mask = demonstration
    kept = [(token, learned) for token, learned in zip(sequence.token_ids, mask, strict=True)
            if token != renderer.image_token_id]  # fmt: skip
    return TokenSequence(tuple(token for token, _ in kept)), [learned for _, learned in kept]


def _split(demonstrations: list[Demonstration], size: int) -> list[list[Demonstration]]:
    return [demonstrations[first : first + size] for first in range(0, len(demonstrations), size)]
