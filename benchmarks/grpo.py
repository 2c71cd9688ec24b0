"""What a step of GRPO costs beside TRL's GRPOTrainer: rollout and update, in one process and one thread.

    make bench-grpo                                          both models in fp32 and bf16 (about twenty minutes)
    python benchmarks/grpo.py --shared DIR                   on DIR/data/puzzlevqa, in words of DIR/qwen3_vl

Two small Qwen3-VLs of random weights answer 4 prompts with an image of 128 x 128 pixels, 16 times each with 64 new
tokens, and learn from them by GRPO without a reference, all parts of the model, AdamW at 1e-6. Ours decodes with the
embedded engine and hands the new weights over; ``whole`` is ours with a prompt read once for each answer, as TRL does
it. TRL generates with transformers, has malloc set to keep what is freed and as many answers in one pass as suit it
best. Both sample by themselves, so that answers differ, while prompts, their tokens and all counts are checked to be
the same. Each side waits while the other has its turn.

The ceiling is what a step could take at least: its products, at the rate of one large matrix product in the same
format, measured here; prompts and images once a group, the output layer on sampled tokens alone. Limits are judged in
the format that is faster for TRL. Exit status 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.grpo_sides.group import NEW_TOKENS, PROMPTS, SAMPLES
from benchmarks.sft_sides.drive import TRL_PYTHON, Side, SideError, take_turns
from benchmarks.sft_sides.material import SIDE, SIZES, write_model, write_processing, write_records
from benchmarks.sft_sides.rounds import StepTaken
from benchmarks.sft_sides.table import differing, is_clean
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.observability.model_flops import Arithmetic, work_of

OURS, TRL = "ours", "TRL"
LIMITS = {"tiny": 3.0, "31M": 2.0}
WARM_UP = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PRODUCT = 2048


def seconds_of(steps: Sequence[StepTaken]) -> float:
    """Median of clean steps by the wall clock behind the warm-up, or of all by CPU time where fewer than two are."""
    counted = steps[WARM_UP:]
    clean = [step.wall for step in counted if is_clean(step)]
    return statistics.median(clean) if len(clean) > 1 else statistics.median(step.cpu for step in counted)


def parts_of(steps: Sequence[StepTaken]) -> Mapping[str, float]:
    """Median seconds of what a step is made of."""
    counted = steps[WARM_UP:]
    return {name: statistics.median(step.parts[name] for step in counted) for name in counted[0].parts}


def flops_rate(dtype: torch.dtype) -> float:
    """FLOPs a second of one large product, the best of five."""
    a, b = (torch.randn(_PRODUCT, _PRODUCT).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * _PRODUCT**3 / best


def least_flops(shape: Qwen3VLShape, *, prompt_tokens: int) -> float:
    """Of a step that reads prompts and images once a group: in the rollout, and for three times as much to learn."""
    arithmetic, side = Arithmetic.of(shape), SIDE // shape.vision.patch
    prompt = work_of(prompt_tokens, 0, [(1, side, side)], merge=shape.vision.merge)
    answer = work_of(prompt_tokens + NEW_TOKENS, NEW_TOKENS, [], merge=shape.vision.merge)
    beyond = arithmetic.language(answer) - arithmetic.language(work_of(prompt_tokens, 0, [], merge=shape.vision.merge))
    once = arithmetic.language(prompt) + arithmetic.tower(prompt) + arithmetic.projector(prompt)
    forward = 2 * PROMPTS * (once + SAMPLES * beyond)
    return forward + 3 * forward


def compare(
    arguments: argparse.Namespace, work: Path, model: str, dtype: str
) -> tuple[Mapping[str, float], Mapping[str, Sequence[StepTaken]]]:
    """Seconds a step of each side. Raises SideError, also where they did not answer the same prompts."""
    sides = [
        Side(OURS, "grpo_sides.ours_side", dtype, "shared"),
        Side(f"{OURS}, whole", "grpo_sides.ours_side", dtype, "whole"),
        Side(TRL, "grpo_sides.trl_side", dtype, "padded"),
    ]
    taken = take_turns(sides, work, model, steps=arguments.steps, steps_in_turn=arguments.turn)
    if apart := differing(taken):
        raise SideError(apart)
    return {name: seconds_of(steps) for name, steps in taken.items()}, taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, help="folder with data/ (real sets) and qwen3_vl/ (the tokenizer)")
    parser.add_argument("--models", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--precisions", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--steps", type=int, default=6, help="of every side, the first of which warms up")
    parser.add_argument("--turn", type=int, default=2, help="steps that a side takes before the next one's turn")
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps {arguments.steps}: the first {WARM_UP} warms up; take more")
    if not TRL_PYTHON.exists():
        parser.error(f"{TRL_PYTHON} does not exist; run make trl")
    torch.set_num_threads(1)
    real, holds = arguments.shared and arguments.shared / "data" / "puzzlevqa", True
    with tempfile.TemporaryDirectory(prefix="bench-grpo-") as folder:
        work = Path(folder)
        write_records(work / "records", real)
        for model in arguments.models:
            write_processing(work / model, arguments.shared and arguments.shared / "qwen3_vl")
            count = write_model(work / model, SIZES[model])
            shape, found = Qwen3VLShape.from_folder(work / model), {}
            for dtype in arguments.precisions:
                seconds, taken = compare(arguments, work, model, dtype)
                found[dtype] = seconds
                show(f"{model}, {count / 1e6:.2f} M weights, {dtype}", seconds, taken, shape, DTYPES[dtype])
            best = min(found, key=lambda dtype: found[dtype][TRL])
            ratio = found[best][TRL] / found[best][OURS]
            held = ratio >= LIMITS[model]
            print(f"  {ratio:.2f} times as fast as TRL in {best}, its faster format (limit {LIMITS[model]}): "
                  f"{'holds' if held else 'DOES NOT HOLD'}", flush=True)  # fmt: skip
            holds &= held
    return 0 if holds else 1


def show(
    title: str,
    seconds: Mapping[str, float],
    taken: Mapping[str, Sequence[StepTaken]],
    shape: Qwen3VLShape,
    dtype: torch.dtype,
) -> None:
    """One model in one format."""
    prompt_tokens = -(-sum(step.prompt_tokens for step in taken[OURS]) // (PROMPTS * len(taken[OURS])))
    least = least_flops(shape, prompt_tokens=prompt_tokens) / flops_rate(dtype)
    print(
        f"\n{title}: {PROMPTS} prompts of about {prompt_tokens} tokens, {SAMPLES} answers of {NEW_TOKENS} tokens each"
    )
    print(f"  {'':14} {'s a step':>9} {'ours is':>8} {'clean':>6}   of which")
    for name, steps in taken.items():
        parts = ", ".join(f"{part} {value:.2f}" for part, value in parts_of(steps).items())
        clean = f"{sum(map(is_clean, steps[WARM_UP:]))}/{len(steps) - WARM_UP}"
        print(f"  {name:14} {seconds[name]:9.2f} {seconds[name] / seconds[OURS]:7.2f}x {clean:>6}   {parts}")
    print(f"  {'at least':14} {least:9.2f}   ceiling beside TRL {seconds[TRL] / least:.1f}x", flush=True)


if __name__ == "__main__":
    sys.exit(main())
