"""How far a discriminator's scores of one text are apart by where it stands: what ``advantages.ROUNDING`` is there for.

Blind spot: the mini, of few layers, on a CPU; FP8, whose noise no test here sees.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from prism_megatron.advantages import ROUNDING
from prism_megatron.data.render import Renderer
from prism_megatron.engine.layers import sdpa
from prism_megatron.engine.runtime import World
from prism_megatron.game.judge import score
from prism_megatron.training.roles import batch_format
from prism_megatron.types import PreferenceGroup
from tests.mini_players import judge_plan, mini_discriminator
from tests.unit.game.mini_judge import POLICY, answer, scenes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_text_scores_alike_wherever_it_stands(
    dtype: torch.dtype, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: over micro-batches of other sizes, with prompts shared or not, scores differ by less than the bound.

    In bfloat16 by more than the bound of float32: that one would make advantages of it. (Short sequences' attention is
    in float32 on a CPU, and on no other device.)
    """
    monkeypatch.setattr(sdpa, "SHORT", 0)
    renderer = Renderer.from_folder(POLICY)
    engine = mini_discriminator(world, dtype=dtype)
    groups = [
        PreferenceGroup(one.prompt, one.reference, tuple(answer(one, renderer, number) for number in range(4)))
        for one in scenes(renderer, 3).batch(0)
    ]
    found: dict[tuple[int, int, int | None], list[float]] = defaultdict(list)
    for tokens in (512, 1024, 4096):
        for shared in (True, False):
            form = replace(batch_format(renderer, world), share_prompts=shared)
            judged = score(engine, groups, judge_plan(form, tokens=tokens, seed=1), world=world, step=0)
            for place, value in judged.scores.items():
                found[place].append(value)
    noise = max((max(scores) - min(scores)) / max(1.0, *map(abs, scores)) for scores in found.values())
    assert noise < ROUNDING[dtype]
    if dtype is torch.bfloat16:
        assert noise > ROUNDING[torch.float32], "blind: this machine rounds alike everywhere"
