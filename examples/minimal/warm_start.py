#!/usr/bin/env python
"""The discriminator's warm-start, between stages 1 and 2, in one file, on the built-in mini world.

A discriminator is made of a policy, with towers of experts in place of every MLP, and learns to score references above
the policy's own answers: -log sigmoid(score(reference) - score(answer)), caption and reasoning each by a tower of its
own. The policy stays as it is. ``prism_megatron/stages/warm_start`` adds files of pairs, servers, a gate, checkpoints,
a report. Start: ``python examples/minimal/warm_start.py --tp 2 --pp 2``, or torchrun.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.stages.discriminator import DiscriminatorConfig
from prism_megatron.config.stages.warm_start import POOLED_LOAD_BALANCE
from prism_megatron.engine.launch import launch

if TYPE_CHECKING:
    from prism_megatron.engine.runtime import World
    from prism_megatron.evaluation.health import Figures

FOLDER, SEED = MINI_FOLDER / "policy", 42
NUM_PROMPTS, NUM_ROLLOUTS = 16, 2  # prompts of a step, answers to each (paper: 128 pairs)
NUM_HELD_OUT, HELD_OUT_ROLLOUTS = 16, 8  # of those that it is measured on at the end
TOKENS_PER_MICROBATCH = 4096  # up to which rows are packed
KIND = DiscriminatorConfig(freeze_vision=True)  # two towers of four experts, of which a token gets two
ADAM = OptimizerConfig(lr=1e-3, schedule="cosine", min_lr_ratio=0.1, warmup_ratio=0.1, beta2=0.95)  # paper: 1e-5
PRINTED = ("reward_gap", "accuracy", "grad_norm")  # ends of names, which are those of metrics.jsonl


def warm_up(world: World, *, steps: int, output: Path, start: Path = FOLDER) -> tuple[list[Figures], Figures]:
    """The whole of it against the policy in ``start``, on all ranks; every step's figures, and those held out."""
    # Not at the top: processes that libraries spawn import this file again and should not pay for torch.
    from prism_megatron.data.loader import SceneSource
    from prism_megatron.data.render import Renderer
    from prism_megatron.engine.host.execution import PLAIN
    from prism_megatron.game.discriminator import DiscriminatorOrigin
    from prism_megatron.game.figures import game_row, rights_of
    from prism_megatron.game.judge import JudgePlan, score, train
    from prism_megatron.rollout.base import Sampling
    from prism_megatron.sampling.replicas import build_replica
    from prism_megatron.sampling.shares import sample_groups
    from prism_megatron.training.figures import update_row
    from prism_megatron.training.roles import export_folder, model_files, resolve_dtype, weights_in_layout

    shape, renderer = Qwen3VLShape.from_folder(start), Renderer.from_folder(start)
    dtype = resolve_dtype("auto", shape)
    # Every expert begins as the policy's MLP with a little noise; routers and the scalar head are drawn.
    origin = DiscriminatorOrigin.of(KIND, of_the_mini=False)
    judge = origin.build(start, shape, world=world, dtype=dtype, optimizer=ADAM, total_steps=steps, seed=SEED)
    form = origin.batch_format(shape, renderer, world=world, execution=PLAIN)
    # The paper's coefficient is of a loss over all layers together, whose value in balance is top_k.
    balance = POOLED_LOAD_BALANCE * KIND.top_k / judge.config.num_layers
    judging = JudgePlan(form, TOKENS_PER_MICROBATCH, score_regulariser=0.001, seed=SEED, load_balance=balance)
    # Every process answers with the policy, which does not learn here.
    rollout, sampling = build_replica(start, renderer, world=world, dtype=dtype), Sampling(max_new_tokens=96)
    rollout.update_weights(weights_in_layout(start, shape, rollout.expert_layout), version=0)
    scenes = SceneSource(renderer, split="sft", seed=SEED, batch_size=NUM_PROMPTS)

    rows: list[Figures] = []
    for step in range(steps):
        # A pair is a prompt's reference and one of the policy's answers that keep the format.
        examples = scenes.batch(step)
        groups = sample_groups(rollout, examples, sampling, n=NUM_ROLLOUTS, seed=SEED, step=step, world=world)
        judgement = train(judge, groups, judging, world=world, step=step)

        # What is reported changes nothing.
        row = game_row(groups, judgement, rights_of(examples, groups, renderer))
        rows.append(row | update_row("discriminator", judgement.result))
        if world.is_main:
            printed = {key: value for key, value in rows[-1].items() if key.endswith(PRINTED) and value is not None}
            shown = (f"{key} {value:.3g}" for key, value in printed.items())
            print(f"step {step + 1}/{steps}:", ", ".join(shown), flush=True)

    # On scenes that it has not learned from: does it rank a prompt's right answers above its wrong ones (auc)?
    examples = SceneSource(renderer, split="heldout", seed=SEED, batch_size=NUM_HELD_OUT).batch(0)
    groups = sample_groups(rollout, examples, sampling, n=HELD_OUT_ROLLOUTS, seed=SEED + 1, step=0, world=world)
    judgement = score(judge, groups, replace(judging, load_balance=0.0), world=world, step=0)
    held_out = game_row(groups, judgement, rights_of(examples, groups, renderer))
    if world.is_main:
        print("held out:", ", ".join(f"{key} {value}" for key, value in held_out.items() if key.endswith("/auc")))
    with TemporaryDirectory() as folder:
        like = Path(folder) / "hf"  # a config that says what was made of the policy's
        if world.is_main:
            origin.files(model_files(start, "policy", dtype=dtype), dtype).write(like)
        export_folder(judge, output / "hf", like=like, world=world)
    return rows, held_out


def run(flags: argparse.Namespace) -> None:
    """One rank's work."""
    from prism_megatron.engine.runtime import start, stop

    world = start(ParallelConfig(tp=flags.tp, pp=flags.pp), seed=SEED)
    warm_up(world, steps=flags.steps, output=flags.output)
    stop(world)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Warm up a discriminator of the mini world on tp x pp processes.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("runs/minimal_warm"), help="gets the discriminator, as hf/")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    arguments = parser.parse_args()
    sys.exit(launch(run, arguments, model_parallel_size=arguments.tp * arguments.pp))
