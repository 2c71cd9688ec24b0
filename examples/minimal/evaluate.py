#!/usr/bin/env python
"""How many questions does a policy answer right, and is it better than another? In one file, on the mini world.

Scenes that no training split has are answered greedily. An answer counts where it is right and in the asked form. Two
policies are asked the same, and the difference is taken question by question. ``prism_megatron/stages/evaluate`` adds
records, samples with pass@k, endpoints, groups of questions, a page, going on. Start:
``python examples/minimal/evaluate.py prism_megatron/assets/mini/aligned --against prism_megatron/assets/mini/policy``.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.stages.rewards import RewardsConfig
from prism_megatron.engine.launch import launch

if TYPE_CHECKING:
    from prism_megatron.engine.runtime import World
    from prism_megatron.evaluation.benchmark.paired import Paired
    from prism_megatron.rewards.rewarder import Rewarded

SEED = 42
MAX_NEW_TOKENS = 96


def answer(world: World, model: Path, *, scenes: int) -> list[Rewarded]:
    """What the policy in ``model`` says to so many held-out scenes, checked; the same list on every rank."""
    # Not at the top: processes that libraries spawn import this file again and should not pay for torch.
    from prism_megatron.data.render import Renderer
    from prism_megatron.rewards.rewarder import Rewarder
    from prism_megatron.rollout.base import Sampling
    from prism_megatron.sampling.replicas import build_replica
    from prism_megatron.sampling.rewarding import reward
    from prism_megatron.sampling.scene_answers import heldout_scenes
    from prism_megatron.sampling.shares import sample_rewarded
    from prism_megatron.training.roles import resolve_dtype, weights_in_layout

    shape, renderer = Qwen3VLShape.from_folder(model), Renderer.from_folder(model)
    # Every rank has the whole policy and answers a share of the questions.
    rollout = build_replica(model, renderer, world=world, dtype=resolve_dtype("auto", shape))
    rollout.update_weights(weights_in_layout(model, shape, rollout.expert_layout), version=0)
    greedy = Sampling(temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)
    with Rewarder(RewardsConfig()) as rewarder:
        found = sample_rewarded(rollout, heldout_scenes(renderer, count=scenes, seed=SEED), greedy,
                                partial(reward, rewarder, renderer), n=1, seed=SEED, step=0, world=world)  # fmt: skip
    return [checked for (checked,) in found.rewards]


def right(answers: list[Rewarded]) -> list[float]:
    """1 for each answer that is right in the form that it has to have, else 0."""
    return [float(one.reward.answer > 0) for one in answers]


def evaluate(world: World, model: Path, *, scenes: int, against: Path | None = None) -> Paired | None:
    """Print how ``model`` answers, and beside ``against`` on the same scenes, if that is named; the comparison."""
    from prism_megatron.evaluation.benchmark.paired import RULE, compare
    from prism_megatron.evaluation.bootstrap import mean_interval

    def asked(name: Path) -> list[float]:
        answers = answer(world, name, scenes=scenes)
        values = right(answers)
        share, form = mean_interval(values, seed=0), sum(one.read.valid for one in answers) / len(answers)
        if world.is_main:
            print(f"{name}: right {share.mean:.3f} [{share.low:.3f}, {share.high:.3f}], in the asked form {form:.3f}")
        return values

    own = asked(model)
    if against is None:
        return None
    paired = compare("greedy/accuracy", own, asked(against))
    if world.is_main:
        change = paired.change
        print(f"change {change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}], p {paired.p:.2g}: {paired.verdict}")
        print(f"({RULE})", flush=True)
    return paired


def run(flags: argparse.Namespace) -> None:
    """One rank's work."""
    from prism_megatron.engine.runtime import start, stop

    world = start(ParallelConfig(), seed=SEED)
    evaluate(world, flags.model, scenes=flags.scenes, against=flags.against)
    stop(world)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ask a policy of the mini world held-out questions.")
    parser.add_argument("model", type=Path, help="a Hugging Face folder, such as the hf/ of another example")
    parser.add_argument("--against", type=Path, help="another one, which is asked the same")
    parser.add_argument("--scenes", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=1, help="processes that share the questions")
    arguments = parser.parse_args()
    sys.exit(launch(run, arguments, model_parallel_size=1, world_size=arguments.ranks))
