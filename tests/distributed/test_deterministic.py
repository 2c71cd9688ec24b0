"""A run with ``--deterministic`` on the CPU, where every kernel is deterministic already: the same rows as without.

Blind to GPUs, where the flag chooses kernels and may refuse some.
"""

from __future__ import annotations

from typing import Any

import torch

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.engine.runtime import World
from prism_megatron.testing import GlooWorld
from tests.integration import game_ranks


def play(world: World) -> tuple[list[dict[str, Any]], bool]:
    """The rows of two steps without their times, and whether torch was deterministic meanwhile."""
    stage = game_ranks.build(world, GameConfig(), "vv", {}, exam_prompts=2)
    stage.prepare(0)
    rows = [dict(stage.play(step).row) for step in range(2)]
    stage.close()
    return rows, torch.are_deterministic_algorithms_enabled()


def test_rows_are_the_same_with_it_and_without() -> None:
    """Bit for bit, of two players at TP2; and the next world of the process is as it was before."""
    with GlooWorld(2) as gloo:
        without = gloo.run(play, parallel=ParallelConfig(tp=2))
        with_it = gloo.run(play, parallel=ParallelConfig(tp=2, deterministic=True))
        again = gloo.run(play, parallel=ParallelConfig(tp=2))
    assert [told for _, told in without] == [told for _, told in again] == [False, False]
    assert [told for _, told in with_it] == [True, True]
    for (plain, _), (strict, _) in zip(without, with_it, strict=True):
        assert len(plain) == 2 and plain == strict
