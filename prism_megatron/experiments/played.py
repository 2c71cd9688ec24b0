"""One arm of an experiment on the mini world: an alignment run, with held-out scenes answered before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from prism_megatron.config.stages.arm import Arm
from prism_megatron.data.loader import Example
from prism_megatron.engine.runtime import World
from prism_megatron.evaluation.health import Figures
from prism_megatron.game.figures import game_row, rights_of
from prism_megatron.run.session import Session
from prism_megatron.sampling.scene_answers import Responses, answer_in_all_modes
from prism_megatron.stages.align.build import build


@dataclass(frozen=True, eq=False)
class Played:
    """What one run of an arm gave. ``last`` is the game's row of the last step."""

    before: Responses
    after: Responses
    last: Figures


def play(
    arm: Arm, examples: Sequence[Example], *, seed: int, steps: int, world: World, before: Responses | None = None
) -> Played:
    """Align for ``steps`` under ``seed``. ``before`` is taken as given where an earlier arm has measured it."""
    config = replace(arm.config, seed=seed, steps=steps)
    # No file is written: only servers would need a folder.
    with closing(build(config, Session(world, Path(), quiet=True))) as stage:
        players, renderer = stage.players, stage.exports.renderer
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
