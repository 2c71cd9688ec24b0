"""What each rank does in the tests of shared prompts: the tiny Qwen3-VL learns from groups of answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.engine import logprobs
from prism_megatron.engine.runtime import World
from prism_megatron.training.batches import BatchFormat
from prism_megatron.training.experience import Experience, ExperienceRow
from prism_megatron.training.policy_loss import denominators_of, policy_loss
from prism_megatron.training.policy_update import UpdatePlan, planned_batches, scores_of
from prism_megatron.types import ImageInput, Prompt, Rollout, Segments, VersionSpan
from tests.distributed import tiny

OBJECTIVES = {
    "grpo": PolicyObjective(family="clipped", clip_high=0.1),
    "gspo": PolicyObjective(family="gspo", clip_low=0.05, clip_high=0.05, aggregation="sequence-mean"),
}
GROUPS = (3, 1, 4)
"""Answers to each prompt; the first two show an image, the last one two."""


@dataclass(frozen=True)
class Learnt:
    """Gradients in one vector and figures by objective, log-probs of all answers, and tokens that passes hold."""

    gradients: Mapping[str, Tensor | None]
    sums: Mapping[str, Mapping[str, float]]
    logprobs: list[list[float]]
    slots: int
    """of this rank's micro-batches"""


def experience() -> Experience:
    """Eight answers of 1 to 9 tokens to three prompts."""
    rng = np.random.default_rng(7)
    pictures = [ImageInput(rng.normal(size=(16, 96)).astype(np.float32), (1, 4, 4)) for _ in range(2)]
    rows = []
    for number, count in enumerate(GROUPS):
        shown = pictures[: 1 + (number == 2)]
        pads = [token for _ in shown for token in (tiny.START, *[tiny.IMAGE] * 4, tiny.END)]
        prompt = Prompt(str(number), (5, *pads, *rng.integers(2, 88, size=4 + number).tolist()), tuple(shown), "?")
        for _ in range(count):
            tokens = tuple(rng.integers(2, 88, size=int(rng.integers(1, 10))).tolist())
            drawn = (VersionSpan(0, 0, len(tokens)),)
            rollout = Rollout(tokens, (-4.0,) * len(tokens), "stop", drawn, Segments(None, None, "not judged"))
            old = (rng.normal(size=len(tokens)) * 0.2 - 4.6).tolist()
            rows.append(ExperienceRow(prompt, rollout, rng.normal(size=len(tokens)).tolist(), old_logprobs=old))
    return Experience(rows, version=0)


def learnt(world: World, share_prompts: bool, budget: int, chunk_elements: int = 2**25) -> Learnt:
    """Every objective's gradient, and the log-probs, with each prompt read once for its answers or once for each."""
    logprobs._CHUNK_ELEMENTS = chunk_elements
    form = BatchFormat(tiny.PAD, 1, world.parallel.length_multiple, world.device, share_prompts=share_prompts)
    engine, own = tiny.build(world), experience()
    gradients: dict[str, Tensor | None] = {}
    sums: dict[str, Mapping[str, float]] = {}
    for name, objective in OBJECTIVES.items():
        plan = UpdatePlan(objective, form, budget)
        output = engine.forward_backward(
            [one.batch for one in planned_batches(own, plan, world=world)],
            partial(
                policy_loss,
                world=world,
                objective=objective,
                denominators=denominators_of(own, objective),
                temperature=1.0,
            ),
        )
        found = {name: gradient.clone().flatten() for name, gradient in engine.export_gradients()}
        gradients[name] = torch.cat([found[name] for name in sorted(found)]) if world.is_main else None
        sums[name] = {**output.sums, **output.maxima}
    plan = UpdatePlan(PolicyObjective(), form, budget)
    bare = replace(own, rows=[replace(row, old_logprobs=None) for row in own.rows])
    scores = scores_of(engine, bare, plan, world=world)
    slots = sum(sum(one.batch.slots) for one in planned_batches(own, plan, world=world))
    return Learnt(gradients, sums, [one.logprobs for one in scores], slots)
