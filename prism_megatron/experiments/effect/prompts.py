"""The scenes that RLVR asks about in each regime, written as the file that ``--prompts`` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

from prism_megatron.config.architecture.model import MiniWorld
from prism_megatron.config.experiments.effect import Regime
from prism_megatron.data.render import Renderer
from prism_megatron.data.scene_set import SceneSet
from prism_megatron.data.scenes import Scene, make_scene
from prism_megatron.disk import write_atomically
from prism_megatron.engine.runtime import World
from prism_megatron.errors import PrismError
from prism_megatron.evaluation.scenes import judge
from prism_megatron.experiments.mini_figures import replica_of
from prism_megatron.rollout.base import RolloutEngine, Sampling
from prism_megatron.sampling.shares import sample_groups

FIRST_OF_RLVR = 100_000
"""Scenes before this one are alignment's."""
_ASKED_AT_ONCE, _ASKED_AT_MOST = 64, 4096
_ROLLOUTS = 16


def write_prompts(
    regime: Regime, policy: Path, target: Path, *, mini: MiniWorld, first: int, max_new_tokens: int, seed: int,
    world: World,
) -> None:  # fmt: skip
    """Write the ids of the regime's scenes, from number ``first`` on; ``policy`` is asked where a pass rate decides.

    Raises PrismError where too few scenes have one that is asked for.
    """
    scenes: Iterator[Scene] = (make_scene("align", seed=seed, index=i, world=mini) for i in count(first))
    if regime.comparisons is not None:
        scenes = _mixed(scenes, regime)
    if regime.is_filtered:
        renderer = Renderer.from_folder(policy, system_prompt=None)
        rollout = replica_of(policy, renderer, world)
        sampling = Sampling(max_new_tokens=max_new_tokens)
        scenes = _between(scenes, regime, rollout, renderer, sampling=sampling, seed=seed, world=world)
    chosen = list(islice(scenes, regime.prompts))
    if len(chosen) < regime.prompts:
        raise PrismError(
            f"{len(chosen)} of {_ASKED_AT_MOST} scenes have a pass rate from {regime.keep_from:g} to "
            f"{regime.keep_to:g}, and the regime asks for {regime.prompts}; register fewer, or wider bounds, in "
            "another --output"
        )
    write_atomically(target, "".join(f"{json.dumps({'id': scene.id})}\n" for scene in chosen))


def _mixed(scenes: Iterator[Scene], regime: Regime) -> Iterator[Scene]:
    """The first ones that make up the mix of questions, in their order."""
    assert regime.comparisons is not None
    left = {True: round(regime.comparisons * regime.prompts)}
    left[False] = regime.prompts - left[True]
    for scene in scenes:
        kind = scene.question.kind == "comparison"
        if left[kind]:
            left[kind] -= 1
            yield scene
        if not any(left.values()):
            return


def _between(
    scenes: Iterator[Scene], regime: Regime, rollout: RolloutEngine, renderer: Renderer, *, sampling: Sampling,
    seed: int, world: World,
) -> Iterator[Scene]:  # fmt: skip
    """Those that the policy answers right as often as the regime wants."""
    for step in range(_ASKED_AT_MOST // _ASKED_AT_ONCE):
        batch = list(islice(scenes, _ASKED_AT_ONCE))
        examples = [SceneSet(batch, renderer, seed=seed, batch_size=1).in_order(i) for i in range(len(batch))]
        if not examples:
            return
        groups = sample_groups(rollout, examples, sampling, n=_ROLLOUTS, seed=seed, step=step, world=world)
        for scene, group in zip(batch, groups, strict=True):
            right = [judge(scene, renderer.decode(one.token_ids)).answer_right for one in group.rollouts]
            if regime.keep_from <= sum(right) / len(right) <= regime.keep_to:
                yield scene
