"""What ranks do for ``test_drift_world.py``; importable by the forked processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prism_megatron.config.checkpoint import CheckpointConfig
from prism_megatron.config.experiments.mini_world import mini_folder
from prism_megatron.config.stages.warm_start import mini_warm_start
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.health import Figures
from prism_megatron.experiments.mini_figures import answers_of, scores_of
from prism_megatron.run.files import EXPORT
from prism_megatron.stages.warm_start.build import warm_up_on

WORLD = mini_folder("drift")
SEED = 11


def answer(world: World, name: str, scenes: int) -> dict[str, dict[str, float]]:
    """Of a shipped policy."""
    return answers_of(WORLD / name, "drift", count=scenes, seed=SEED, world=world)


def score(world: World, discriminator: Path, prompts: int) -> Figures:
    """Of samples of the shipped policy."""
    return scores_of(discriminator, WORLD / "policy", "drift", prompts=prompts, rollouts=8, seed=SEED, world=world)


def warm_up_blind(world: World, output: Path, prompts: int) -> Figures:
    """The recipe's warm-start of a discriminator that is shown no image, and its figures as :func:`score` has them."""
    recipe = mini_warm_start("drift")
    warm_up_on(
        world,
        replace(
            recipe,
            discriminator=replace(recipe.discriminator, modality="text"),
            gate=replace(recipe.gate, min_auc=0.0, gate_prompts=2),
            checkpoint=CheckpointConfig(output=output, save_every=1_000),
        ),
    )
    return score(world, output / EXPORT, prompts)
