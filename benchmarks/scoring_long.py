"""What the discriminator's pass costs at the paper's lengths, beside the released way of doing it: time and memory.

    make bench-scoring-long                             one group of 16 answers, on one thread (over an hour, 16 GiB)
    python benchmarks/scoring_long.py --layers 1        half of the time and of the memory
    python benchmarks/scoring_long.py --budget 65536    tokens of a micro-batch of ours

A prompt of 1,500 tokens, 1,024 of them an image's, captions of 400 and reasoning of 4,500; the widths of 2B with two
layers of each kind, random weights, the vision tower frozen. The ways:

    ours      an alignment step: ``judge.train`` in micro-batches of 16,384 tokens, prompts shared, references beside or
              apart as the plan says
    released  pair by pair: reference and rollout x caption and reasoning, four whole rows, each with a copy of the
              prompt and of the image, as the paper's authors released it

Each has a process of its own, one after the other, and takes no optimizer's step. Seconds are CPU time of one thread;
memory is the peak of the resident set beyond weights that have just been made. Scores must agree to 1e-5 of the
largest in fp32, and to 3e-2 in bf16, which keeps 8 bits of every sum. Both formats are measured where this CPU
multiplies bf16 matrices faster than fp32 ones, else fp32 alone; not a GPU benchmark. The exit code is 1 where a limit
does not hold.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.nn import functional

from benchmarks.model import DTYPES, formats_here
from benchmarks.scoring import (
    build_chunk,
    draw_weights,
    forget_peak,
    layers_of_2b,
    padded_batch,
    row_of,
    status_bytes,
    with_own_image,
)
from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.towers import Towers
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.engine import MegatronEngine
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.host.fast_paths import FastPaths
from prism_megatron.engine.provider import StepResult
from prism_megatron.engine.runtime import World, start, stop
from prism_megatron.game.judge import JudgePlan, train
from prism_megatron.game.judged_rows import ScoreRow
from prism_megatron.training.batches import BatchFormat
from prism_megatron.types import (
    TOWERS,
    ImageInput,
    Prompt,
    Response,
    Rollout,
    RolloutGroup,
    Segments,
    Span,
    VersionSpan,
)

PROMPT, CAPTION, REASONING = 1500, 400, 4500
IMAGE_SIDE = 64
"""Patches; an image token stands for four."""
STD = 0.02
FAST = FastPaths(fuse_weight_gradients=True)
"""As a run's ``--fuse-weight-gradients auto`` on a CPU."""
LIMIT = 2.5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
Scores = Mapping[tuple[int, int | None], float]
"""Of every (tower, answer); answer None is the reference."""


class Taken(NamedTuple):
    """What a way took: CPU seconds, bytes and token slots through the trunk."""

    seconds: float
    peak_bytes: int
    trunk_tokens: int
    scores: Scores


def group_of(shape: Qwen3VLShape, answers: int) -> RolloutGroup:
    """A group at the paper's lengths, of random tokens."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(10, 900, count).tolist())

    visual = IMAGE_SIDE**2 // shape.vision.merge**2
    pixels = rng.standard_normal((IMAGE_SIDE**2, shape.vision.patch_dim), dtype=np.float32)
    text = tokens(PROMPT - visual)
    image = ImageInput(pixels, (1, IMAGE_SIDE, IMAGE_SIDE))
    prompt = Prompt("long", (*text[:3], *[shape.image_token_id] * visual, *text[3:]), (image,), "")
    length = CAPTION + REASONING
    segments = Segments(Span(0, CAPTION), Span(CAPTION, length), None)
    reference = Response(tokens(length), segments)
    rollouts = tuple(
        Rollout(tokens(length), (0.0,) * length, "stop", (VersionSpan(0, 0, length),), segments) for _ in range(answers)
    )
    return RolloutGroup(prompt, reference, rollouts)


class Gradients(MegatronEngine):
    """An engine that stops before the optimizer's step, whose moments a small machine does not hold beside the rest."""

    def step(self, *, update: bool = False) -> StepResult:
        """Nothing is updated."""
        return super().step(update=update)


class Work(NamedTuple):
    """What both ways are given."""

    shape: Qwen3VLShape
    group: RolloutGroup
    form: BatchFormat
    dtype: torch.dtype
    budget: int


def ours(world: World, work: Work) -> Taken:
    """What an alignment step does."""
    provider = DiscriminatorProvider(
        work.shape, Towers(), head_dropout=0.0, freeze_vision=True, execution=Execution(fast=FAST)
    )
    engine = Gradients(
        name="discriminator", provider=provider, world=world, dtype=work.dtype, optimizer=OptimizerConfig(),
        total_steps=1, fast=FAST,
    )  # fmt: skip
    draw_weights(engine.modules[0], std=STD)
    plan = JudgePlan(work.form, work.budget, score_regulariser=0.0, seed=0)

    def step() -> tuple[int, Scores]:
        judgement = train(engine, [work.group], plan, world=world, step=0)
        print(f"    overhead {judgement.cost.overhead:.2f}, references "
              f"{'apart' if judgement.cost.apart else 'beside their rollouts'}", flush=True)  # fmt: skip
        return judgement.cost.trunk_tokens, {key[1:]: score for key, score in judgement.scores.items()}

    return measured(step)


def released(world: World, work: Work) -> Taken:
    """Four whole rows a pair, forward and backward."""
    chunk = build_chunk(work.shape, world, std=STD, dtype=work.dtype)
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(not name.startswith("vision_model."))

    def step() -> tuple[int, Scores]:
        tokens, scores = 0, {}
        for answer in range(len(work.group.rollouts)):
            pair = []
            for of in (None, answer):
                for tower in TOWERS:
                    key = ScoreRow(0, tower, of)
                    row = row_of([work.group], key, work.form)
                    batch = padded_batch(work.form, [(key, with_own_image(row))])
                    tokens += batch.input_ids_B_S.numel()
                    pair.append(chunk(batch)[0])
                    scores[tower, of] = float(pair[-1])
            references, rollouts = torch.cat(pair[: len(TOWERS)]), torch.cat(pair[len(TOWERS) :])
            (-functional.logsigmoid(references - rollouts).sum() / len(work.group.rollouts)).backward()
        return tokens, scores

    return measured(step)


def measured(step: Callable[[], tuple[int, Scores]]) -> Taken:
    """One run of ``step`` in this process."""
    forget_peak()
    before, began = status_bytes("VmRSS"), time.process_time()
    tokens, scores = step()
    return Taken(time.process_time() - began, status_bytes("VmHWM") - before, tokens, scores)


WAYS = {"ours": ours, "released": released}


def take(name: str, layers: int, answers: int, budget: int, dtype: torch.dtype) -> Taken:
    """A way in this process, which it has to itself."""
    shape = layers_of_2b(layers)

    def way(world: World) -> Taken:
        form = BatchFormat(pad_token_id=0, end_token_id=1, length_multiple=1, device=world.device, share_prompts=True)
        return WAYS[name](world, Work(shape, group_of(shape, answers), form, dtype, budget))

    return in_world(way)


def in_world(way: Callable[[World], Taken]) -> Taken:
    """What a way takes in a world of one rank and one thread."""
    torch.set_num_threads(1)
    world = start(ParallelConfig(distributed_optimizer=False), seed=1)
    taken = way(world)
    stop(world)
    return taken


def alone(take_way: Callable[..., Taken], *arguments: object) -> Taken:
    """``take_way(*arguments)`` in a process of its own. Unlike a pool of multiprocessing, this tells of a process that
    the system has ended for its memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(take_way, *arguments).result()


def compared(dtype: torch.dtype, layers: int, answers: int, budget: int) -> bool:
    """Print what both ways take; whether limits hold."""
    print(f"{dtype}", flush=True)
    found = {}
    for name in WAYS:
        found[name] = taken = alone(take, name, layers, answers, budget, dtype)
        print(f"  {name:9} {taken.seconds:8.1f} s  {taken.peak_bytes / 2**30:6.2f} GiB  {taken.trunk_tokens:7} tokens "
              "forward", flush=True)  # fmt: skip
    mine, theirs = found["ours"], found["released"]
    largest = max(map(abs, theirs.scores.values()))
    error = max(abs(mine.scores[key] - score) for key, score in theirs.scores.items()) / largest
    ratio, tolerance = theirs.seconds / mine.seconds, TOLERANCE[dtype]
    print(f"  scores differ by {error:.0e} of the largest (limit {tolerance:.0e})")
    print(f"  {ratio:.2f} times as fast as released (limit {LIMIT}): {'holds' if ratio >= LIMIT else 'DOES NOT HOLD'}")
    return ratio >= LIMIT and error <= tolerance


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--budget", type=int, default=16384, help="tokens of a micro-batch of ours")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtypes = formats_here() if arguments.dtype == "auto" else (DTYPES[arguments.dtype],)
    lengths = f"prompt {PROMPT}, caption {CAPTION}, reasoning {REASONING}, {arguments.answers} answers"
    print(f"2B widths x {arguments.layers} layers: {lengths}", flush=True)
    good = [compared(dtype, arguments.layers, arguments.answers, arguments.budget) for dtype in dtypes]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
