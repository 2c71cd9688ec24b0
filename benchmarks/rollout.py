"""Tokens per second of embedded rollouts beside ``transformers.generate(num_return_sequences=n)``, in one run.

    python benchmarks/rollout.py

Two workloads on the shipped mini weights: prompts with one image of 64 visual tokens, and with four of 256. Both sides
draw ``--new-tokens`` tokens for every sample (no end token), so that the work is the same; at temperature 0 they must
give the same tokens, or the run ends with an error. ``prefill`` is a run of one new token, ``decode`` the rest.
Seconds are CPU seconds of one thread: other load on the machine disturbs them less than the wall clock. The exit code
is 1 where a workload's ratio is below its limit.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from prism_megatron.config.mini_world import MINI_FOLDER
from prism_megatron.rollout.base import Sampling
from prism_megatron.rollout.embedded import EmbeddedRollout
from prism_megatron.types import ImageInput, Prompt, Segments

TEXT_TOKENS = 30


@dataclass(frozen=True)
class Workload:
    """Images of side x side visual tokens in every prompt; the ratio to transformers that must be reached."""

    images: int
    side: int
    at_least: float


WORKLOADS = (Workload(images=1, side=8, at_least=2.0), Workload(images=4, side=16, at_least=3.0))


class GoOn:
    """Never ends a response."""

    def add(self, token_id: int) -> bool:
        del token_id
        return False


class NoSegments:
    """Judging responses is not part of the measured work."""

    def find(self, token_ids: Sequence[int]) -> Segments:
        return Segments(None, None, f"{len(token_ids)} tokens, not judged")

    def watch(self) -> GoOn:
        return GoOn()


class Vendor:
    """transformers' own generate on the same prompts."""

    def __init__(self, folder: Path) -> None:
        model_class: Any = Qwen3VLForConditionalGeneration
        self.model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.placeholders = [self.model.config.image_token_id, self.model.config.video_token_id]

    def generate(self, prompts: Sequence[Prompt], new_tokens: int, **options: Any) -> Tensor:
        """Token ids of the responses, ``[rows, new_tokens]``."""
        ids = torch.tensor([prompt.token_ids for prompt in prompts])
        images = [image for prompt in prompts for image in prompt.images]
        result: Tensor = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == self.placeholders[0]).int(),
            pixel_values=torch.from_numpy(np.concatenate([image.pixel_values_P_D for image in images])),
            image_grid_thw=torch.tensor([image.grid_thw for image in images]),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            suppress_tokens=self.placeholders,
            pad_token_id=0,
            **options,
        )
        return result[:, ids.shape[1] :]


def make_prompt(seed: int, work: Workload, config: Any) -> Prompt:
    """The images between two halves of the text."""
    rng = np.random.default_rng(seed)
    vision = config.vision_config
    text = rng.integers(0, config.vision_start_token_id - 64, TEXT_TOKENS).tolist()
    side = work.side * vision.spatial_merge_size
    patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = [rng.standard_normal((side * side, patch_dim), dtype=np.float32) for _ in range(work.images)]
    pads = [config.image_token_id] * work.side**2
    shown = [config.vision_start_token_id, *pads, config.vision_end_token_id] * work.images
    ids = (*text[: TEXT_TOKENS // 2], *shown, *text[TEXT_TOKENS // 2 :])
    return Prompt(str(seed), ids, tuple(ImageInput(p, (1, side, side)) for p in pixels), "")


def check_greedy(engine: EmbeddedRollout, vendor: Vendor, prompts: Sequence[Prompt], new_tokens: int) -> None:
    """Raise unless both take the same tokens at temperature 0."""
    greedy = Sampling(temperature=0.0, max_new_tokens=new_tokens)
    ours = [group[0].token_ids for group in engine.generate(prompts, 1, greedy, seed=0, step=0)]
    theirs = [tuple(row) for row in vendor.generate(prompts, new_tokens, do_sample=False).tolist()]
    if ours != theirs:
        raise SystemExit(f"at temperature 0 the embedded engine gives {ours}, transformers {theirs}")


def best_seconds(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """CPU seconds of the fastest of ``repeats`` calls of each run, in turn: other load only ever adds time."""
    best = [math.inf] * len(runs)
    for _ in range(repeats):
        for r, run in enumerate(runs):
            start = time.process_time()
            run()
            best[r] = min(best[r], time.process_time() - start)
    return best


def measure(work: Workload, engine: EmbeddedRollout, vendor: Vendor, args: argparse.Namespace) -> bool:
    """Print the rows of one workload; whether its limit is reached."""
    prompts = [make_prompt(seed, work, vendor.model.config) for seed in range(args.prompts)]
    check_greedy(engine, vendor, prompts, args.new_tokens)
    print(
        f"\n{args.prompts} prompts of {len(prompts[0].token_ids)} tokens ({work.images} x {work.side**2} visual) "
        f"x {args.samples} samples x {args.new_tokens} new tokens; greedy tokens are equal"
    )
    seconds: dict[str, list[float]] = {}
    for name, new_tokens in (("prefill", 1), ("whole", args.new_tokens)):
        ours = partial(engine.generate, prompts, args.samples, Sampling(max_new_tokens=new_tokens), seed=0, step=0)
        theirs = partial(
            vendor.generate, prompts, new_tokens, do_sample=True, top_k=0, num_return_sequences=args.samples
        )
        seconds[name] = best_seconds((ours, theirs), args.repeats)
    whole, prefill = seconds["whole"], seconds["prefill"]
    seconds["decode"] = [whole[0] - prefill[0], whole[1] - prefill[1]]
    rows = args.prompts * args.samples
    tokens = {"prefill": rows, "decode": rows * (args.new_tokens - 1), "whole": rows * args.new_tokens}
    for name in ("prefill", "decode", "whole"):
        (embedded, transformers), count = seconds[name], tokens[name]
        print(
            f"{name:>8}: embedded {embedded:7.3f} s {count / embedded:9,.0f} tokens/s | "
            f"transformers {transformers:7.3f} s {count / transformers:9,.0f} tokens/s | "
            f"ratio {transformers / embedded:5.2f}"
        )
    ratio = whole[1] / whole[0]
    print(
        f"   limit: {work.at_least:g} x transformers: {'reached' if ratio >= work.at_least else 'MISSED'}", flush=True
    )
    return ratio >= work.at_least


def main() -> int:
    """Measure both workloads; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16, help="samples of each prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each sample; at least 2")
    parser.add_argument("--repeats", type=int, default=4, help="runs of each row, of which the fastest counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = MINI_FOLDER / "policy"
    vendor = Vendor(folder)
    unreachable = vendor.model.config.text_config.vocab_size  # an end token beyond the vocabulary: none ends early
    engine = EmbeddedRollout(folder, NoSegments(), end_token_ids=[unreachable], device=torch.device("cpu"))
    engine.update_weights(vendor.model.state_dict().items(), version=0)
    print(f"one thread, fp32, torch {torch.__version__}", end="")
    reached = [measure(work, engine, vendor, args) for work in WORKLOADS]
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
