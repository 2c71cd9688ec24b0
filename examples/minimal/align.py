#!/usr/bin/env python
"""Alignment by PRISM (arXiv 2604.28123, stage 2) in one file, on the built-in mini world.

A policy answers questions about images. A mixture-of-experts discriminator, a second Megatron model on the same ranks,
learns to tell its captions and its reasoning from reference answers. The policy is rewarded by nothing but the scores:
min over policies, max over discriminators of E[score(reference) - score(answer)] (4). ``prism_megatron/stages/align``
adds checkpoints, controls, servers, a report. Start: ``python examples/minimal/align.py --tp 2 --pp 2``, or torchrun.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.stages.discriminator import DiscriminatorConfig
from prism_megatron.config.stages.game import GameConfig
from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.engine.launch import launch

if TYPE_CHECKING:
    from prism_megatron.engine.runtime import World
    from prism_megatron.evaluation.health import Figures

FOLDER, SEED = MINI_FOLDER / "policy", 42
NUM_PROMPTS, NUM_ROLLOUTS = 8, 8  # prompts of a step, answers to each (paper: 4 and 16)
TOKENS_PER_MICROBATCH = 2048  # up to which rows of either player are packed
POLICY_ADAM = OptimizerConfig(lr=5e-5)  # the paper's rate, 1e-6 for both players, is for billions of parameters
DISCRIMINATOR_ADAM = OptimizerConfig(lr=5e-4, beta2=0.95)  # faster: it has to stay ahead of the policy
PRINTED = ("reward_gap", "accuracy", "valid_share", "grad_norm")  # ends of names, which are those of metrics.jsonl


def align(world: World, *, steps: int, output: Path, start: Path = FOLDER, judge: str | None = None) -> list[Figures]:
    """The alignment of ``start``, against a saved ``judge`` or the shipped one, on all ranks; every step's figures."""
    # Not at the top: processes that libraries spawn import this file again and should not pay for torch.
    from prism_megatron.data.loader import SceneSource
    from prism_megatron.data.render import Renderer
    from prism_megatron.engine.host.execution import PLAIN
    from prism_megatron.game.credit import credit_groups, experience_of
    from prism_megatron.game.discriminator import DiscriminatorOrigin
    from prism_megatron.game.figures import game_row, rights_of
    from prism_megatron.game.judge import JudgePlan, train
    from prism_megatron.rollout.base import Sampling
    from prism_megatron.sampling.handover import Handover
    from prism_megatron.sampling.replicas import build_replica
    from prism_megatron.sampling.shares import sample_groups
    from prism_megatron.training.figures import update_row
    from prism_megatron.training.policy_update import UpdatePlan, measure_policy, update_policy
    from prism_megatron.training.roles import build_policy, export_folder, resolve_dtype

    shape, renderer, game = Qwen3VLShape.from_folder(start), Renderer.from_folder(start), GameConfig()
    dtype = resolve_dtype("auto", shape)
    # Two Megatron models with an optimizer each. The discriminator is a Qwen3-VL with two towers of experts in place of
    # every MLP, one for captions (perception) and one for reasoning; the mini's has been warmed up.
    policy = build_policy(start, shape, world=world, dtype=dtype, optimizer=POLICY_ADAM, total_steps=steps)
    origin = DiscriminatorOrigin.of(DiscriminatorConfig(discriminator=judge), of_the_mini=True)
    discriminator = origin.build(start, shape, world=world, dtype=dtype, optimizer=DISCRIMINATOR_ADAM,
                                 total_steps=steps, seed=SEED)  # fmt: skip
    form = origin.batch_format(shape, renderer, world=world, execution=PLAIN)
    # Every process samples with a replica of the policy, which is empty until the first hand-over.
    rollout = build_replica(start, renderer, world=world, dtype=dtype)
    handover, sampling = Handover(policy, rollout), Sampling(temperature=1.0, max_new_tokens=96)
    scenes = SceneSource(renderer, split="align", seed=SEED, batch_size=NUM_PROMPTS)
    judging = JudgePlan(form, TOKENS_PER_MICROBATCH, score_regulariser=game.score_regulariser, seed=SEED)
    learning = UpdatePlan(PolicyObjective(), form, TOKENS_PER_MICROBATCH, sampling.temperature)

    rows: list[Figures] = []
    handover(0, changed_only=False)  # version 0, whole; a later one is what training changed of it
    for step in range(steps):
        # Draws are keyed by (seed, step, prompt, sample): another layout gets the same answers.
        examples = scenes.batch(step)
        groups = sample_groups(rollout, examples, sampling, n=NUM_ROLLOUTS, seed=SEED, step=step, world=world)
        # Bradley-Terry in each tower: every valid answer against its prompt's one reference. The scores are those
        # before the update, of a discriminator that has not learnt from these answers.
        judgement = train(discriminator, groups, judging, world=world, step=step)
        # Each token's advantage is how far its answer's scores stand out in the group (GRPO, arXiv 2402.03300), tower
        # by tower and then mixed; breaking the format costs 1.5.
        credited = credit_groups(groups, judgement, game, seed=SEED, step=step, version=step)
        experience = experience_of(groups, credited, game, version=step)
        # REINFORCE: the answers are this very policy's, so nothing is to be clipped. Without a reward it only measures.
        learn = update_policy if experience.rewarded and judgement.finite else measure_policy
        update = learn(policy, experience, learning, world=world)
        handover(step + 1)

        # What is reported changes nothing.
        row = game_row(groups, judgement, rights_of(examples, groups, renderer))
        row |= update_row("discriminator", judgement.result) | update_row("policy", update.result)
        row["valid_share"] = sum(len(group.valid_rollouts) for group in groups) / (NUM_PROMPTS * NUM_ROLLOUTS)
        rows.append(row)
        if world.is_main:
            shown = (f"{key} {value:.3g}" for key, value in row.items() if key.endswith(PRINTED) and value is not None)
            print(f"step {step + 1}/{steps}:", ", ".join(shown), flush=True)
    export_folder(policy, output / "hf", like=start, world=world)
    return rows


def run(flags: argparse.Namespace) -> None:
    """One rank's work."""
    from prism_megatron.engine.runtime import start, stop

    world = start(ParallelConfig(tp=flags.tp, pp=flags.pp), seed=SEED)
    align(world, steps=flags.steps, output=flags.output)
    stop(world)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Align the mini world's policy on tp x pp processes.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/minimal"), help="folder that gets the policy, as hf/")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    arguments = parser.parse_args()
    sys.exit(launch(run, arguments, model_parallel_size=arguments.tp * arguments.pp))
