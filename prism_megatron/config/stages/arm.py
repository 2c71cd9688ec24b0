"""One arm of an experiment: a whole configuration under a name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from prism_megatron.config.stages.align import AlignConfig

ALIGNED = "aligned"


@dataclass(frozen=True)
class Arm:
    """A configuration to play; ``random_discriminator`` replaces the discriminator's weights by noise."""

    name: str
    config: AlignConfig
    random_discriminator: bool = False


def effect_arms(recipe: AlignConfig) -> list[Arm]:
    """The effect and its three controls."""
    game = recipe.game
    return [
        Arm(ALIGNED, recipe),
        Arm("lr0", replace(recipe, game=replace(game, freeze_policy=True))),
        Arm("random", replace(recipe, game=replace(game, freeze_discriminator=True)), random_discriminator=True),
        Arm("shuffled", replace(recipe, game=replace(game, shuffle_scores=True))),
    ]
