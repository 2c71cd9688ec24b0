#!/usr/bin/env python
"""Reinforcement learning with verifiable rewards (stage 3) in one file, on the built-in mini world.

The aligned policy answers questions whose answer is known. An answer gains by how much its reward is above its group's
(GRPO, arXiv 2402.03300), and the policy is held near to what it was. No discriminator plays.
``prism_megatron/stages/rlvr`` adds records, selected prompts, dynamic sampling, servers, held-out questions,
checkpoints, a report. Start: ``python examples/minimal/rlvr.py --tp 2 --pp 2``, or torchrun.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.config.stages.rewards import RewardsConfig
from prism_megatron.engine.launch import launch

if TYPE_CHECKING:
    from prism_megatron.engine.runtime import World
    from prism_megatron.evaluation.health import Figures

FOLDER, SEED = MINI_FOLDER / "aligned", 42
NUM_PROMPTS, NUM_ROLLOUTS = 16, 8  # prompts of a step, answers to each (paper: 32 and 16)
TOKENS_PER_MICROBATCH = 4096  # up to which rows are packed
# GRPO's clipped surrogate and its KL of 0.04 to the policy as it came, each a mean over an answer's tokens.
OBJECTIVE = PolicyObjective(family="clipped", aggregation="sequence-mean", kl="k3", kl_coefficient=0.04)
ADAM = OptimizerConfig(lr=1e-4)  # the paper's rate, 1e-6, is for billions of parameters


def reinforce(world: World, *, steps: int, output: Path, start: Path = FOLDER) -> list[Figures]:
    """The whole of it from the policy in ``start``, on all ranks together; returns every step's figures."""
    # Not at the top: processes that libraries spawn import this file again and should not pay for torch.
    import torch

    from prism_megatron.advantages import group_normalise
    from prism_megatron.data.loader import SceneSource
    from prism_megatron.data.render import Renderer
    from prism_megatron.rewards.rewarder import Rewarder
    from prism_megatron.rollout.base import Sampling
    from prism_megatron.sampling.handover import Handover
    from prism_megatron.sampling.replicas import build_replica
    from prism_megatron.sampling.rewarding import reward
    from prism_megatron.sampling.shares import sample_rewarded
    from prism_megatron.training.experience import Experience, ExperienceRow
    from prism_megatron.training.figures import update_row
    from prism_megatron.training.policy_update import UpdatePlan, beside_reference, update_policy
    from prism_megatron.training.roles import batch_format, build_policy, export_folder, resolve_dtype

    shape, renderer = Qwen3VLShape.from_folder(start), Renderer.from_folder(start)
    dtype, form = resolve_dtype("auto", shape), batch_format(renderer, world, share_prompts=True)
    policy = build_policy(start, shape, world=world, dtype=dtype, optimizer=ADAM, total_steps=steps)
    reference = build_policy(start, shape, world=world, dtype=dtype, optimizer=None, total_steps=steps)
    # Every process samples with a replica of the policy, which is empty until the first hand-over.
    rollout = build_replica(start, renderer, world=world, dtype=dtype)
    handover, sampling = Handover(policy, rollout), Sampling(temperature=1.0, max_new_tokens=96)
    scenes = SceneSource(renderer, split="align", seed=SEED, batch_size=NUM_PROMPTS)
    learning = UpdatePlan(OBJECTIVE, form, TOKENS_PER_MICROBATCH, sampling.temperature)

    rows: list[Figures] = []
    handover(0, changed_only=False)  # version 0, whole; a later one is what training changed of it
    with Rewarder(RewardsConfig()) as rewarder:  # 0.8 for a right answer and 0.2 for the form, without which nothing
        check = partial(reward, rewarder, renderer)
        for step in range(steps):
            # Whoever draws an answer has it checked, in processes of their own, while others are being drawn.
            sampled = sample_rewarded(rollout, scenes.batch(step), sampling, check,
                                      n=NUM_ROLLOUTS, seed=SEED, step=step, world=world)  # fmt: skip
            answers: list[ExperienceRow] = []
            for group, checked in zip(sampled.groups, sampled.rewards, strict=True):
                rewards_N = torch.tensor([one.reward.total for one in checked], dtype=torch.float64)
                # (reward - mean) / std; a group whose answers are all worth the same teaches nothing.
                advantages_N = group_normalise(rewards_N).tolist()
                answers += [ExperienceRow(group.prompt, one, [advantage] * len(one.token_ids))
                            for one, advantage in zip(group.rollouts, advantages_N, strict=True)]  # fmt: skip
            found = [one.reward for checked in sampled.rewards for one in checked]
            row: Figures = {"reward/mean": fmean(one.total for one in found),
                            "reward/accuracy": fmean(one.answer > 0 for one in found)}  # fmt: skip
            experience = Experience(answers, step, rewarded=any(any(one.advantages) for one in answers))
            if experience.rewarded:
                experience = beside_reference(reference, experience, learning, world=world)
                update = update_policy(policy, experience, learning, world=world)
                row |= {"policy_loss": update.sums["policy_loss"], **update_row("policy", update.result)}
            handover(step + 1)

            rows.append(row)
            if world.is_main:
                print(f"step {step + 1}/{steps}:", ", ".join(f"{key} {value:.3g}" for key, value in row.items()),
                      flush=True)  # fmt: skip
    export_folder(policy, output / "hf", like=start, world=world)
    return rows


def run(flags: argparse.Namespace) -> None:
    """One rank's work."""
    from prism_megatron.engine.runtime import start, stop

    world = start(ParallelConfig(tp=flags.tp, pp=flags.pp), seed=SEED)
    reinforce(world, steps=flags.steps, output=flags.output)
    stop(world)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Reinforce the mini world's aligned policy on tp x pp processes.")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("runs/minimal_rlvr"), help="folder for the policy, as hf/")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    arguments = parser.parse_args()
    sys.exit(launch(run, arguments, model_parallel_size=arguments.tp * arguments.pp))
