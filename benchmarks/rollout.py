"""Tokens per second of embedded rollouts beside ``transformers.generate``, in one run, on random mini-sized weights.

    python benchmarks/rollout.py --prompts 8 --samples 8 --new-tokens 64

Both sides draw ``new-tokens`` tokens for every sample (no end token), so that the work is the same. Seconds are CPU
seconds of one thread: other load on the machine disturbs them less than the wall clock.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from prism_megatron.rollout.base import Sampling
from prism_megatron.rollout.embedded import EmbeddedRollout
from prism_megatron.types import ImageInput, Prompt, Segments

VOCAB, IMAGE = 512, 500
UNREACHABLE = VOCAB  # an end token beyond the vocabulary: no sample ends early
TEXT_TOKENS = 30


class NoSegments:
    """Judging responses is not part of the measured work."""

    def find(self, token_ids: Sequence[int]) -> Segments:
        return Segments(None, None, f"{len(token_ids)} tokens, not judged")


def mini_config() -> Qwen3VLConfig:
    """Sizes of the mini world's policy."""
    return Qwen3VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "num_heads": 4,
            "intermediate_size": 256,
            "patch_size": 16,
            "out_hidden_size": 128,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        tie_word_embeddings=True,
    )


def make_prompt(seed: int, images: int, side: int) -> Prompt:
    """``images`` images of side x side visual tokens, between two halves of the text."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, IMAGE, TEXT_TOKENS).tolist()
    grid = (1, 2 * side, 2 * side)
    pixels = [rng.standard_normal((grid[1] * grid[2], 3 * 2 * 16 * 16), dtype=np.float32) for _ in range(images)]
    pads = [token for _ in range(images) for token in (IMAGE + 2, *[IMAGE] * side * side, IMAGE + 3)]
    ids = (*text[: TEXT_TOKENS // 2], *pads, *text[TEXT_TOKENS // 2 :])
    return Prompt(str(seed), ids, tuple(ImageInput(p, grid) for p in pixels), "")


def generate_with_transformers(model: Any, prompts: Sequence[Prompt], n: int, new_tokens: int) -> None:
    ids = torch.tensor([prompt.token_ids for prompt in prompts])
    images = [image for prompt in prompts for image in prompt.images]
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == IMAGE).int(),
        pixel_values=torch.from_numpy(np.concatenate([image.pixel_values_P_D for image in images])),
        image_grid_thw=torch.tensor([image.grid_thw for image in images]),
        num_return_sequences=n,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=True,
        top_k=0,
        pad_token_id=0,
    )


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """CPU seconds of the fastest of ``repeats`` runs after a warm-up: other load only ever adds time."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def main() -> None:
    """Print one row per engine and length of the response; one new token is the prefill alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="samples of each prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--images", type=int, default=1, help="images in each prompt")
    parser.add_argument("--side", type=int, default=3, help="visual tokens along one side of an image")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    model_class: Any = Qwen3VLForConditionalGeneration
    model = model_class(mini_config()).eval()
    model.generation_config.eos_token_id = None
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        engine = EmbeddedRollout(
            Path(folder), NoSegments(), end_token_ids=[UNREACHABLE], device=torch.device("cpu"), rows_per_batch=4096
        )
    engine.update_weights(model.state_dict().items(), version=0)
    prompts = [make_prompt(seed, args.images, args.side) for seed in range(args.prompts)]
    print(
        f"{args.prompts} prompts of {len(prompts[0].token_ids)} tokens x {args.samples} samples, "
        f"one thread, fp32, torch {torch.__version__}"
    )
    for new_tokens in (1, args.new_tokens):
        sampling = Sampling(max_new_tokens=new_tokens)
        embedded = best_seconds(partial(engine.generate, prompts, args.samples, sampling, seed=0, step=0), args.repeats)
        vendor = best_seconds(
            partial(generate_with_transformers, model, prompts, args.samples, new_tokens), args.repeats
        )
        total = args.prompts * args.samples * new_tokens
        print(
            f"{new_tokens:4d} new tokens: embedded {embedded:.3f} s ({total / embedded:,.0f} tokens/s), "
            f"transformers {vendor:.3f} s ({total / vendor:,.0f} tokens/s), ratio {vendor / embedded:.2f}"
        )


if __name__ == "__main__":
    main()
