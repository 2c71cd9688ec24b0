#!/usr/bin/env python
"""Supervised fine-tuning (stage 1) in one file, on the built-in mini world.

A policy learns to write what its teacher writes: the loss is the mean of -log p(token) over the tokens of the teacher's
answers, prompts and images only being read. The mini's teacher is sloppy, so that there is something to align later.
``prism_megatron/stages/sft`` adds records, an index, resumable order, held-out loss, checkpoints, a report. Start:
``python examples/minimal/sft.py --tp 2 --pp 2``, or torchrun.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from prism_megatron.config.architecture.model import ALL_VISION, FAITHFUL_SHARE
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.engine.launch import launch

if TYPE_CHECKING:
    from prism_megatron.engine.runtime import World
    from prism_megatron.evaluation.health import Figures

FOLDER, SEED = MINI_FOLDER / "base", 42
NUM_ROWS, SCENES_PER_ROW = 8, 4  # packed rows of a step, over all data-parallel ranks, and conversations in each
# The paper's rate, 1e-5 with the same cosine, is for billions of parameters.
ADAM = OptimizerConfig(lr=1e-3, schedule="cosine", min_lr_ratio=0.05, warmup_ratio=0.05, beta2=0.95)


def fine_tune(world: World, *, steps: int, output: Path) -> list[Figures]:
    """The whole of it, on all ranks together; returns every step's figures."""
    # Not at the top: processes that libraries spawn import this file again and should not pay for torch.
    from prism_megatron.data.loader import SceneSource
    from prism_megatron.data.render import Renderer
    from prism_megatron.data.teachers import SLOPPY_TEACHER
    from prism_megatron.training.batches import supervised_batch
    from prism_megatron.training.figures import update_row
    from prism_megatron.training.roles import batch_format, build_policy, export_folder, resolve_dtype
    from prism_megatron.training.supervised_update import learn

    shape, renderer = Qwen3VLShape.from_folder(FOLDER), Renderer.from_folder(FOLDER)
    dtype, form = resolve_dtype("auto", shape), batch_format(renderer, world)
    # Vision tower and projector stay as they are, as in the paper: the rest learns to write about what they see.
    policy = build_policy(FOLDER, shape, world=world, dtype=dtype, optimizer=ADAM, total_steps=steps, freeze=ALL_VISION)
    scenes = SceneSource(renderer, split="sft", seed=SEED, batch_size=NUM_ROWS * SCENES_PER_ROW,
                         teacher=SLOPPY_TEACHER["habits"], faithful_share=FAITHFUL_SHARE)  # fmt: skip

    rows: list[Figures] = []
    share = NUM_ROWS // world.dp_size
    for step in range(steps):
        # Scenes have numbers, and a data-parallel rank takes its own: another layout learns from the same.
        first_row = step * NUM_ROWS + world.dp_rank * share
        batches = []
        for row in range(first_row, first_row + share):
            examples = [scenes.example(row * SCENES_PER_ROW + place) for place in range(SCENES_PER_ROW)]
            # Tokens of prompt and answer, and a mask that is 1 on those to be learned: the answer's, its end included.
            conversations = [renderer.training_row(example.prompt, example.reference) for example in examples]
            # Side by side in one row, without seeing one another: positions and attention begin anew with each.
            batches.append(
                supervised_batch([one for one, _ in conversations], [mask for _, mask in conversations],
                                 form=form, pack=True)
            )  # fmt: skip
        # Every rank's sum of -log p(label), divided by the labels of the whole step: no layout changes a gradient.
        update = learn(policy, batches, world=world)

        # What is reported changes nothing.
        row_of_step: Figures = {"loss": update.loss, "label_tokens": update.label_tokens}
        rows.append(row_of_step | update_row("policy", update.result))
        if world.is_main:
            print(f"step {step + 1}/{steps}: loss {update.loss:.3g}, policy_grad_norm {update.result.grad_norm:.3g}",
                  flush=True)  # fmt: skip
    export_folder(policy, output / "hf", like=FOLDER, world=world)
    return rows


def run(flags: argparse.Namespace) -> None:
    """One rank's work."""
    from prism_megatron.engine.runtime import start, stop

    world = start(ParallelConfig(tp=flags.tp, pp=flags.pp), seed=SEED)
    fine_tune(world, steps=flags.steps, output=flags.output)
    stop(world)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune the mini world's base on tp x pp processes.")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--output", type=Path, default=Path("runs/minimal_sft"), help="folder for the policy, as hf/")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    arguments = parser.parse_args()
    sys.exit(launch(run, arguments, model_parallel_size=arguments.tp * arguments.pp))
