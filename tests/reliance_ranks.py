"""Visual reliance of the mini as tests run it, on one rank and on several."""

from __future__ import annotations

from collections.abc import Mapping

from prism_megatron.config.experiments.mini import MINI_ALIGN
from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.config.tools.visual_reliance import VisualRelianceConfig
from prism_megatron.data.loader import SceneSource
from prism_megatron.engine.runtime import World
from prism_megatron.stages.visual_reliance.build import measure_on
from prism_megatron.training.policy_update import UpdatePlan
from prism_megatron.training.prompts import renderer_of
from prism_megatron.training.roles import batch_format
from prism_megatron.training.visual_reliance import Asked, Likelihood, Reliance, likelihoods, visual_reliance
from tests.mini_players import FOLDER, mini_policy

TOKENS = 400
"""Of a micro-batch: a few rows."""


def asked_of_scenes(count: int) -> list[Asked]:
    """Held-out scenes with their faithful descriptions."""
    scenes = SceneSource(renderer_of(FOLDER, MINI_ALIGN.data), split="heldout", seed=3, batch_size=1)
    return [Asked(one.prompt, one.reference) for one in map(scenes.example, range(count))]


def readings(world: World, count: int) -> list[Mapping[str, Likelihood]]:
    """Of each response, in one pass."""
    plan = UpdatePlan(PolicyObjective(), batch_format(renderer_of(FOLDER, MINI_ALIGN.data), world), TOKENS)
    return likelihoods(mini_policy(world), asked_of_scenes(count), plan, world=world)


def measured(world: World, config: VisualRelianceConfig) -> dict[str, Reliance]:
    """What the command finds and writes."""
    return measure_on(world, config)


def reliance(world: World, count: int, at_once: int = 4) -> dict[str, Reliance]:
    """What a rank finds."""
    form = batch_format(renderer_of(FOLDER, MINI_ALIGN.data), world)
    return visual_reliance(
        mini_policy(world),
        asked_of_scenes(count),
        form=form,
        tokens_per_microbatch=TOKENS,
        world=world,
        at_once=at_once,
    )
