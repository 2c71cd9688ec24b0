#!/usr/bin/env python
"""All stages in a row in one file, on the built-in mini world: the paper's order, and what each one hands to the next.

base -> fine-tuned (sft) -> with a discriminator made of it (warm_start) -> aligned (align) -> reinforced (rlvr), with
the same held-out questions after each. The stages are those of the files beside this one, in one world of processes.
``prism_megatron/pipeline`` plays each as a command of its own, from a YAML, and adds selection of prompts, resuming, a
report. Start: ``python examples/minimal/pipeline.py --tp 2 --pp 2``, or torchrun.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.minimal.align import align
from examples.minimal.evaluate import answer, right
from examples.minimal.rlvr import reinforce
from examples.minimal.sft import FOLDER, SEED, fine_tune
from examples.minimal.warm_start import warm_up
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.launch import launch

if TYPE_CHECKING:
    from prism_megatron.engine.runtime import World
    from prism_megatron.evaluation.bootstrap import Interval


def play(world: World, *, shorter: int, scenes: int, output: Path) -> dict[str, Interval]:
    """All stages, in ``1 / shorter`` of their steps; the share of right answers after each that trains the policy."""
    from prism_megatron.evaluation.bootstrap import mean_interval

    found: dict[str, Interval] = {}

    def ask(name: str, model: Path) -> None:
        found[name] = mean_interval(right(answer(world, model, scenes=scenes)), seed=0)
        if world.is_main:
            print(
                f"after {name}: {found[name].mean:.3f} right [{found[name].low:.3f}, {found[name].high:.3f}]",
                flush=True,
            )

    def steps(usual: int) -> int:
        return max(1, usual // shorter)

    sft, warm, aligned, rlvr = (output / name for name in ("sft", "warm_start", "align", "rlvr"))
    ask("base", FOLDER)
    # What a sloppy teacher shows is learned with its faults.
    fine_tune(world, steps=steps(120), output=sft)
    ask("sft", sft / "hf")
    # The discriminator begins as the policy that it will play against, and sees that policy's answers first.
    warm_up(world, steps=steps(40), output=warm, start=sft / "hf")
    align(world, steps=steps(40), output=aligned, start=sft / "hf", judge=str(warm / "hf"))
    ask("align", aligned / "hf")
    reinforce(world, steps=steps(40), output=rlvr, start=aligned / "hf")
    ask("rlvr", rlvr / "hf")
    return found


def run(flags: argparse.Namespace) -> None:
    """One rank's work."""
    from prism_megatron.engine.runtime import start, stop

    world = start(ParallelConfig(tp=flags.tp, pp=flags.pp), seed=SEED)
    play(world, shorter=flags.shorter, scenes=flags.scenes, output=flags.output)
    stop(world)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Play all stages on the mini world, on tp x pp processes.")
    parser.add_argument("--shorter", type=int, default=1, help="by which the steps of every stage are divided")
    parser.add_argument("--scenes", type=int, default=256, help="held-out scenes that are asked after every stage")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/minimal_pipeline"), help="gets a folder for each stage"
    )
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    arguments = parser.parse_args()
    sys.exit(launch(run, arguments, model_parallel_size=arguments.tp * arguments.pp))
