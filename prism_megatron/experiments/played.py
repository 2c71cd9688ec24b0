"""One arm of an experiment on the mini world: an alignment run, with held-out scenes answered before and after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from model_providers.moe_discriminator.upcycle import keyed_normal
from prism_megatron.config.arm import Arm
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.conversion.open_source import open_weights
from prism_megatron.data.loader import Example
from prism_megatron.data.render import Renderer
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.bootstrap import Interval, mean_interval
from prism_megatron.evaluation.health import Figures
from prism_megatron.evaluation.scenes import SceneJudgement, item_accuracy
from prism_megatron.experiments.held_out import SceneResponse, answer_scenes
from prism_megatron.game.discriminator import DiscriminatorOrigin
from prism_megatron.game.figures import game_row, rights_of
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.run.session import Session
from prism_megatron.stages.align.build import build

MODES = {"T=1": 1.0, "greedy": 0.0}
"""How held-out scenes are sampled: name and temperature."""
MEASURES: dict[str, Callable[[SceneJudgement], float]] = {
    "item accuracy": item_accuracy,
    "caption exact": lambda one: float(one.caption_exact),
    "step validity": lambda one: one.step_validity,
    "reasoning exact": lambda one: float(one.reasoning_exact),
    "answer right": lambda one: float(one.answer_right),
}
RANDOM_STD = 0.05

Responses = Mapping[str, Sequence[SceneResponse]]
"""Per mode: one response to each held-out scene."""
Table = dict[str, dict[str, np.ndarray]]
"""Per mode and measure: one value per (seed, scene), float64 ``[seeds, scenes]``."""


@dataclass(frozen=True, eq=False)
class Played:
    """What one run of an arm gave. ``last`` is the game's row of the last step."""

    before: Responses
    after: Responses
    last: Figures


@dataclass(frozen=True, eq=False)
class RandomSource(TensorSource):
    """Fresh weights with the names and shapes of ``like``: norms 1, everything else N(0, 0.05²), keyed by the seed."""

    like: TensorSource
    seed: int

    def names(self) -> Sequence[str]:
        return self.like.names()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.like.shapes()

    def dtypes(self) -> Mapping[str, torch.dtype]:
        return dict.fromkeys(self.like.names(), torch.float32)

    def get(self, name: str) -> torch.Tensor:
        shape = self.like.shapes()[name]
        if "norm" in name:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        return keyed_normal(shape, std=RANDOM_STD, seed=self.seed, name=name)


def play(
    arm: Arm, examples: Sequence[Example], *, seed: int, steps: int, world: World, before: Responses | None = None
) -> Played:
    """Align for ``steps`` under ``seed``. ``before`` is taken as given where an earlier arm has measured it."""
    config = replace(arm.config, seed=seed, steps=steps)
    # No file is written: only servers would need a folder.
    with closing(build(config, Session(world, Path(), quiet=True))) as stage:
        players, renderer = stage.players, stage.exports.renderer
        if arm.random_discriminator:
            folder = DiscriminatorOrigin.of(config.discriminator, of_the_mini=config.model.model is None).folder
            assert folder is not None, "a random discriminator takes the shape of a saved one"
            players.discriminator.load_hf(RandomSource(open_weights(folder), seed))
        stage.prepare(0)
        answers = partial(
            answer_in_all_modes,
            players.rollout,
            examples,
            renderer,
            max_new_tokens=config.data.max_response_tokens,
            seed=seed,
            world=world,
        )
        if before is None:
            before = answers()
        for step in range(steps):
            stage.play(step)
        last: Figures = {}
        if stage.last is not None:
            groups = stage.last.groups
            last = game_row(groups, stage.last.judgement, rights_of(stage.last.examples, groups, renderer))
        return Played(before, answers(), last)


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
