"""Held-out scenes answered by a policy: each answer judged against the known truth, and its form counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prism_megatron.config.architecture.model import MiniWorld
from prism_megatron.data.loader import Example, SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.tokenizer import END_TOKEN
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.bootstrap import Interval, mean_interval
from prism_megatron.evaluation.proxies import ResponseForm, response_form
from prism_megatron.evaluation.scenes import SceneJudgement, item_accuracy, judge
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.sampling.shares import sample_groups

MODES = {"T=1": 1.0, "greedy": 0.0}
"""How held-out scenes are sampled: name and temperature."""
MEASURES: dict[str, Callable[[SceneJudgement], float]] = {
    "item accuracy": item_accuracy,
    "caption exact": lambda one: float(one.caption_exact),
    "step validity": lambda one: one.step_validity,
    "reasoning exact": lambda one: float(one.reasoning_exact),
    "answer right": lambda one: float(one.answer_right),
}


@dataclass(frozen=True)
class SceneResponse:
    """One response to a scene: how right it is, and its form, which is None where the format is not valid."""

    judgement: SceneJudgement
    form: ResponseForm | None


Responses = Mapping[str, Sequence[SceneResponse]]
"""Per mode: one response to each held-out scene."""
Table = dict[str, dict[str, np.ndarray]]
"""Per mode and measure: one value per (seed, scene), float64 ``[seeds, scenes]``."""


def heldout_scenes(renderer: Renderer, *, count: int, seed: int, world: MiniWorld = "habits") -> Sequence[Example]:
    """The first ``count`` scenes of the held-out split, whose questions and contents no training split has."""
    return SceneSource(renderer, split="heldout", seed=seed, batch_size=count, world=world).batch(0)


def answer_scenes(
    rollout: RolloutEngine,
    examples: Sequence[Example],
    renderer: Renderer,
    sampling: Sampling,
    *,
    seed: int,
    world: World,
) -> list[SceneResponse]:
    """One response per scene; the same list on every rank. Draws are keyed by ``seed``, not by the policy."""
    groups = sample_groups(rollout, examples, sampling, n=1, seed=seed, step=0, world=world)
    responses = []
    for example, group in zip(examples, groups, strict=True):
        if example.scene is not None:
            token_ids = group.rollouts[0].token_ids
            text = renderer.decode(token_ids)
            responses.append(SceneResponse(judge(example.scene, text), _form(text, len(token_ids))))
    return responses


def answer_in_all_modes(
    rollout: RolloutEngine,
    examples: Sequence[Example],
    renderer: Renderer,
    *,
    max_new_tokens: int,
    seed: int,
    world: World,
) -> Responses:
    """The held-out scenes answered once in each mode."""
    return {
        mode: answer_scenes(
            rollout,
            examples,
            renderer,
            Sampling(temperature=temperature, max_new_tokens=max_new_tokens),
            seed=seed,
            world=world,
        )
        for mode, temperature in MODES.items()
    }


def tabulate(runs: Sequence[Responses]) -> Table:
    """Responses of several seeds as arrays ``[seeds, scenes]`` per mode and measure."""
    return {
        mode: {
            measure: np.array([[read(one.judgement) for one in run[mode]] for run in runs])
            for measure, read in MEASURES.items()
        }
        for mode in MODES
    }


def level(values: np.ndarray) -> Interval:
    """Mean of ``[seeds, scenes]`` with its 95 % bootstrap interval; scenes are resampled, seeds averaged within one."""
    return mean_interval(values.mean(axis=0), seed=0)


def change(after: np.ndarray, before: np.ndarray) -> Interval:
    """Mean paired change of ``[seeds, scenes]``, with the interval of :func:`level`."""
    return level(after - before)


def reference_forms(examples: Sequence[Example], renderer: Renderer) -> list[ResponseForm]:
    """The form of the examples' references: the supervision that drift is measured from."""
    forms = [
        _form(renderer.decode(example.reference.token_ids), len(example.reference.token_ids)) for example in examples
    ]
    return [form for form in forms if form is not None]


def _form(text: str, tokens: int) -> ResponseForm | None:
    return response_form(text.removesuffix(END_TOKEN), tokens=tokens)
