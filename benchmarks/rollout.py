"""Tokens per second of embedded rollouts beside ``transformers.generate`` and SGLang, in one run.

    python benchmarks/rollout.py

Two workloads on the shipped mini weights: prompts with one image of 64 visual tokens, and with four of 256. All sides
draw ``--new-tokens`` tokens for every sample (no end token), so that the work is the same; at temperature 0 they must
give the same tokens, or the run ends with an error. ``prefill`` is a run of one new token, ``decode`` the rest.
Seconds are CPU seconds of one thread: other load on the machine disturbs them less than the wall clock. SGLang's are
those of all processes of its server and of the client, and its cache never holds a prompt beforehand; it is left out
where ``make sglang`` has not been run. The exit code is 1 where a workload's ratio to transformers is below its limit.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.data.pictures.images import ImagePreprocessor
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.rollout.embedded import EmbeddedRollout
from prism_megatron.rollout.sglang.arguments import PYTHON, ServerOptions
from prism_megatron.rollout.sglang.requests import Answer, RequestFormat
from prism_megatron.rollout.sglang.restarts import Restarts
from prism_megatron.rollout.sglang.server import SGLangServers
from prism_megatron.types import Prompt, Segments

TEXT_TOKENS = 30


@dataclass(frozen=True)
class Workload:
    """Images of side x side visual tokens in every prompt; the ratio to transformers that must be reached."""

    images: int
    side: int
    at_least: float


WORKLOADS = (Workload(images=1, side=8, at_least=2.0), Workload(images=4, side=16, at_least=3.0))


@dataclass(frozen=True)
class Side:
    """One side's run of a row, and the clock that counts its CPU seconds."""

    name: str
    run: Callable[[], object]
    clock: Callable[[], float]


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


class Served:
    """An SGLang server of the same folder, asked as the trainer asks it."""

    def __init__(self, folder: Path, logs: Path, preprocessor: ImagePreprocessor, config: Any) -> None:
        options = ServerOptions(
            model=folder,
            logs=logs,
            dtype="float32",
            context_length=config.text_config.max_position_embeddings,
            max_total_tokens=2**16,
            max_running_requests=256,
        )
        self._servers = SGLangServers(options, count=1, restarts=Restarts(0))
        self._format = RequestFormat(
            preprocessor,
            image_token_id=config.image_token_id,
            end_token_ids=[],
            never_sampled=[config.image_token_id, config.video_token_id],
        )
        self._threads = ThreadPoolExecutor()
        self._servers.start()

    def generate(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> list[list[Answer]]:
        client = self._servers.servers[0].client

        def ask(prompt: Prompt) -> list[Answer]:
            body = self._format.request(prompt, n, sampling)
            body["sampling_params"] |= {"ignore_eos": True, "stop_regex": None}
            answers = self._format.answers(prompt, n, client.post("/generate", body, seconds=600.0))
            assert answers is not None
            return answers

        return list(self._threads.map(ask, prompts))

    def clock(self) -> float:
        """CPU seconds so far of the server's processes and of this one."""
        leader = psutil.Process(self._servers.servers[0].pid)
        times = [process.cpu_times() for process in (leader, *leader.children(recursive=True))]
        return time.process_time() + sum(spent.user + spent.system for spent in times)

    def close(self) -> None:
        self._threads.shutdown()
        self._servers.stop()


@dataclass(frozen=True)
class Bench:
    """The sides, and how much they are asked for; ``served`` is None where SGLang is not installed."""

    embedded: EmbeddedRollout
    vendor: Vendor
    served: Served | None
    preprocessor: ImagePreprocessor
    num_prompts: int
    samples: int
    new_tokens: int
    repeats: int

    def prompts(self, work: Workload, seeds: Iterator[int]) -> list[Prompt]:
        """Prompts that no side has seen."""
        config = self.vendor.model.config
        return [make_prompt(seed, work, config, self.preprocessor) for seed in islice(seeds, self.num_prompts)]


def make_prompt(seed: int, work: Workload, config: Any, preprocessor: ImagePreprocessor) -> Prompt:
    """The images, of random colours, between two halves of the text."""
    rng = np.random.default_rng(seed)
    vision = config.vision_config
    text = rng.integers(0, config.vision_start_token_id - 64, TEXT_TOKENS).tolist()
    pixels = work.side * vision.spatial_merge_size * vision.patch_size
    images = tuple(
        preprocessor(Image.fromarray(rng.integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)))
        for _ in range(work.images)
    )
    pads = [config.image_token_id] * work.side**2
    shown = [config.vision_start_token_id, *pads, config.vision_end_token_id] * work.images
    ids = (*text[: TEXT_TOKENS // 2], *shown, *text[TEXT_TOKENS // 2 :])
    return Prompt(str(seed), ids, images, "")


def roomy_folder(target: Path) -> Path:
    """The mini's policy with image limits that let the workloads' images through as they are."""
    shutil.copytree(MINI_FOLDER / "policy", target)
    path = target / "preprocessor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["size"]["longest_edge"] = 2**20  # pixels, in spite of the name
    path.write_text(json.dumps(settings), encoding="utf-8")
    return target


def check_greedy(bench: Bench, prompts: Sequence[Prompt]) -> None:
    """Raise unless all take the same tokens at temperature 0."""
    greedy = Sampling(temperature=0.0, max_new_tokens=bench.new_tokens)
    ours = [group[0].token_ids for group in bench.embedded.generate(SampleRequest(prompts, 1, greedy, seed=0, step=0))]
    theirs = {"transformers": bench.vendor.generate(prompts, bench.new_tokens, do_sample=False).tolist()}
    if bench.served is not None:
        theirs["SGLang"] = [answer.token_ids for (answer,) in bench.served.generate(prompts, 1, greedy)]
    for name, tokens in theirs.items():
        if ours != list(map(tuple, tokens)):
            raise SystemExit(f"at temperature 0 the embedded engine gives {ours}, {name} {tokens}")


def best_seconds(sides: Sequence[Side], num_runs: int) -> list[float]:
    """CPU seconds of each side's fastest run, taken in turn: other load only ever adds time."""
    best = [math.inf] * len(sides)
    for _ in range(num_runs):
        for s, side in enumerate(sides):
            start = side.clock()
            side.run()
            best[s] = min(best[s], side.clock() - start)
    return best


def sides_of(bench: Bench, work: Workload, new_tokens: int, seeds: Iterator[int]) -> list[Side]:
    """What each side runs for one row; SGLang, which keeps what it has read, reads new prompts every time."""
    prompts = bench.prompts(work, seeds)
    sampling = Sampling(max_new_tokens=new_tokens)
    embedded = partial(bench.embedded.generate, SampleRequest(prompts, bench.samples, sampling, seed=0, step=0))
    vendor = partial(
        bench.vendor.generate, prompts, new_tokens, do_sample=True, top_k=0, num_return_sequences=bench.samples
    )
    sides = [
        Side("embedded", embedded, time.process_time),
        Side("transformers", vendor, time.process_time),
    ]
    if bench.served is not None:
        served = bench.served
        unread = iter([bench.prompts(work, seeds) for _ in range(bench.repeats)])
        sides.append(Side("SGLang", lambda: served.generate(next(unread), bench.samples, sampling), served.clock))
    return sides


def measure(work: Workload, bench: Bench) -> bool:
    """Print the rows of one workload; whether its limit is reached."""
    seeds = count()
    prompts = bench.prompts(work, seeds)
    check_greedy(bench, prompts)
    print(
        f"\n{bench.num_prompts} prompts of {len(prompts[0].token_ids)} tokens ({work.images} x {work.side**2} visual) "
        f"x {bench.samples} samples x {bench.new_tokens} new tokens; greedy tokens are equal"
    )
    seconds: dict[str, list[float]] = {}
    names: list[str] = []
    for row, new_tokens in (("prefill", 1), ("whole", bench.new_tokens)):
        sides = sides_of(bench, work, new_tokens, seeds)
        names = [side.name for side in sides]
        seconds[row] = best_seconds(sides, bench.repeats)
    seconds["decode"] = [whole - prefill for whole, prefill in zip(seconds["whole"], seconds["prefill"], strict=True)]
    rows = bench.num_prompts * bench.samples
    tokens = {"prefill": rows, "decode": rows * (bench.new_tokens - 1), "whole": rows * bench.new_tokens}
    for row in ("prefill", "decode", "whole"):
        embedded = seconds[row][0]
        cells = [
            f"{name} {spent:7.3f} s {tokens[row] / spent:9,.0f} tokens/s" + (f" x{spent / embedded:5.2f}" if s else "")
            for s, (name, spent) in enumerate(zip(names, seconds[row], strict=True))
        ]
        print(f"{row:>8}: {' | '.join(cells)}")
    ratio = seconds["whole"][1] / seconds["whole"][0]
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
    with ExitStack() as stack:
        aside = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = roomy_folder(aside / "model")
        preprocessor = ImagePreprocessor.from_folder(folder)
        vendor = Vendor(folder)
        config = vendor.model.config
        unreachable = config.text_config.vocab_size  # an end token beyond the vocabulary: none ends early
        engine = EmbeddedRollout(folder, NoSegments(), end_token_ids=[unreachable], device=torch.device("cpu"))
        engine.update_weights(vendor.model.state_dict().items(), version=0)
        print(f"one thread, fp32, torch {torch.__version__}")
        served: Served | None = None
        if PYTHON.exists():
            served = Served(folder, aside / "logs", preprocessor, config)
            stack.callback(served.close)
        else:
            print(f"SGLang is left out: {PYTHON} does not exist; `make sglang` sets it up")
        bench = Bench(engine, vendor, served, preprocessor, args.prompts, args.samples, args.new_tokens, args.repeats)
        reached = [measure(work, bench) for work in WORKLOADS]
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
