"""How fast the discriminator judges a step, and in how much memory, beside the padded ways of doing it.

    make bench-scoring                       everything, on one thread
    python benchmarks/scoring.py mini        one workload: mini or 2B
    python benchmarks/scoring.py --turns 3   the fastest of so many turns

The workloads are 4 prompts x 16 rollouts of the shipped mini, and the widths of 2B with two layers in each tower of the
model (2 prompts x 4 rollouts, 64 visual tokens, the lengths that the mini's segments have). The ways:

    ours               what an alignment step does: one packed row; a prompt is read once for each tower, an image
                       encoded once
    packed             the same with every sequence whole
    padded             every reference and image once: one padded batch
    padded by segment  every reference once: a padded batch of captions and one of reasoning, which pads less
    released           four padded batches, reference and rollout x caption and reasoning, where each pair has its own
                       copy of the reference and each row its own copy of the image

All of them run the same model, kernels and loss in one process, in turns; a number is the fastest turn in CPU seconds
of one thread. Memory is the growth of the resident set of a forked process that does the work once. Scores must agree
to 1e-5 of the largest. ``score`` is a forward pass only, ``train`` one forward and backward pass, with the vision tower
frozen or trained. All of it in fp32: this is no GPU benchmark, and few CPUs are faster in bf16. The exit code is 1
where a limit does not hold.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from megatron.core.transformer import MegatronModule
from torch import Tensor
from torch.nn import functional

from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.towers import Towers
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.config.presets import preset
from prism_megatron.conversion.hf.open_source import open_weights
from prism_megatron.data.loader import SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.engine.batch import Batch, Extra, collate
from prism_megatron.engine.building import build_chunks
from prism_megatron.engine.runtime import World, start, stop
from prism_megatron.engine.vision.images import SharedImages
from prism_megatron.game.judged_rows import ScorePart, ScoreRow, discriminator_batch, segment_row
from prism_megatron.rollout.base import Sampling
from prism_megatron.sampling.replicas import build_replica
from prism_megatron.sampling.shares import sample_groups
from prism_megatron.training.batches import BatchFormat
from prism_megatron.training.roles import batch_format
from prism_megatron.types import ImageInput, Prompt, Response, Rollout, RolloutGroup, Segments, Span, TokenSequence

OURS = "ours"
LIMITS: Mapping[tuple[str, ...], float] = {("released",): 2.5, ("padded", "padded by segment"): 1.3}
"""How many times faster than the fastest of these ours has to be."""
TOLERANCE = 1e-5
LIBC = ctypes.CDLL(None)
M_MMAP_THRESHOLD = -3
"""glibc's mallopt: larger blocks go back to the system when they are freed, so that they count again the next time."""
PASSES = ("score", "train, vision frozen", "train, vision trained")
Pair = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Way:
    """Batches of a way, where each pair's two scores stand among all of theirs, and which images they share."""

    batches: Sequence[Batch]
    reference_of: Mapping[Pair, int]
    rollout_of: Mapping[Pair, int]

    @property
    def tokens(self) -> int:
        """Tokens through the trunk, padding included."""
        return sum(batch.input_ids_B_S.numel() for batch in self.batches)

    @property
    def images(self) -> int:
        """Images encoded where the tower is trained."""
        return sum(len(batch.images) for batch in self.batches)

    def score(self, chunk: MegatronModule) -> Tensor:
        """Scores of the pairs, ``[2, pairs]``: the reference's and the rollout's."""
        shared = SharedImages(batch.images for batch in self.batches)
        batches = (dataclasses.replace(batch, shared_images=shared) for batch in self.batches)
        scores = torch.cat([chunk(batch)[0] for batch in batches])
        return torch.stack([scores[list(of.values())] for of in (self.reference_of, self.rollout_of)])


@dataclass(frozen=True, eq=False)
class Workload:
    """A model and the groups of a step."""

    name: str
    chunk: MegatronModule
    groups: Sequence[RolloutGroup]
    form: BatchFormat

    def pairs(self) -> list[Pair]:
        return [(g, t, r) for g, group in enumerate(self.groups) for t in group.towers for r in group.valid_rollouts]


def ways(work: Workload) -> dict[str, Way]:
    """Every way by its name; the pairs in one order."""
    parts = [
        ScorePart(g, tower, (None, *group.valid_rollouts))
        for g, group in enumerate(work.groups)
        for tower in group.towers
    ]
    pairs, once = work.pairs(), _rows_once(work)
    by_tower = [[row for row in once if row.tower == tower] for tower in (0, 1)]
    repeated = [
        [(pair, ScoreRow(pair[0], pair[1], rollout and pair[2])) for pair in pairs if pair[1] == tower]
        for rollout in (None, True)
        for tower in (0, 1)
    ]
    return {
        OURS: _packed(work, parts, share_prompts=True),
        "packed": _packed(work, parts, share_prompts=False),
        "padded": _padded(work, [once]),
        "padded by segment": _padded(work, by_tower),
        "released": _released(work, repeated),
    }


def _rows_once(work: Workload) -> list[ScoreRow]:
    return [
        ScoreRow(g, tower, answer)
        for g, group in enumerate(work.groups)
        for tower in group.towers
        for answer in (None, *group.valid_rollouts)
    ]


def _packed(work: Workload, parts: Sequence[ScorePart], *, share_prompts: bool) -> Way:
    form = dataclasses.replace(work.form, share_prompts=share_prompts)
    counts = [sum(row.tower == tower for row in _rows_once(work)) for tower in (0, 1)]
    batch, keys = discriminator_batch(work.groups, tuple(parts), form=form, seed=0, step=0, sequences_per_tower=counts)
    return _way([batch], keys, work.pairs())


def _way(batches: Sequence[Batch], keys: Sequence[ScoreRow | None], pairs: Sequence[Pair]) -> Way:
    place = {(key.group, key.tower, key.rollout): at for at, key in enumerate(keys) if key is not None}
    return Way(batches, {p: place[p[0], p[1], None] for p in pairs}, {p: place[p] for p in pairs})


def _padded(work: Workload, parts: Sequence[Sequence[ScoreRow]]) -> Way:
    batches = [padded_batch(work.form, [(key, row_of(work.groups, key, work.form)) for key in keys]) for keys in parts]
    return _way(batches, [key for keys in parts for key in keys], work.pairs())


def _released(work: Workload, parts: Sequence[Sequence[tuple[Pair, ScoreRow]]]) -> Way:
    references: dict[Pair, int] = {}
    rollouts: dict[Pair, int] = {}
    batches, start = [], 0
    for part in parts:
        own = [(key, with_own_image(row_of(work.groups, key, work.form))) for _, key in part]
        batches.append(padded_batch(work.form, own))
        places = {pair: start + at for at, (pair, _) in enumerate(part)}
        (references if part[0][1].rollout is None else rollouts).update(places)
        start += len(part)
    pairs = work.pairs()
    return Way(batches, {p: references[p] for p in pairs}, {p: rollouts[p] for p in pairs})


def row_of(groups: Sequence[RolloutGroup], key: ScoreRow, form: BatchFormat) -> TokenSequence:
    """Prompt and segment of one answer."""
    group = groups[key.group]
    answer: Response | Rollout = group.reference if key.rollout is None else group.rollouts[key.rollout]
    return segment_row(group, answer, key.tower, form)


def with_own_image(row: TokenSequence) -> TokenSequence:
    """The row with a copy of its image, which is encoded for it alone."""
    return dataclasses.replace(row, images=tuple(dataclasses.replace(image) for image in row.images))


def padded_batch(form: BatchFormat, rows: Sequence[tuple[ScoreRow, TokenSequence]]) -> Batch:
    """Whole rows side by side."""
    return collate(
        [row for _, row in rows],
        pad_token_id=form.pad_token_id,
        multiple_of=1,
        device=form.device,
        tower_ids=[key.tower for key, _ in rows],
        sequence_extras={Extra.DROPOUT_KEY: [0 for _ in rows]},
    )


def mini(world: World) -> Workload:
    """The shipped discriminator, and a step of the shipped policy's samples."""
    folder = MINI_FOLDER / "policy"
    renderer = Renderer.from_folder(folder)
    source, scenes = open_weights(folder), SceneSource(renderer, split="align", seed=7, batch_size=4)
    rollout = build_replica(folder, renderer, world=world, dtype=torch.float32)
    rollout.update_weights(((name, source.get(name)) for name in source.names()), version=0)
    groups = sample_groups(rollout, scenes.batch(0), Sampling(max_new_tokens=96), n=16, seed=7, step=0, world=world)
    shape = Qwen3VLShape.from_folder(folder)
    chunk = build_chunk(shape, world, std=0.05)
    return Workload("mini, 4 prompts x 16 rollouts", chunk, groups, batch_format(renderer, world))


def wide(world: World, like: Workload) -> Workload:
    """Random weights and tokens; the lengths of ``like``'s segments."""
    shape = layers_of_2b(2)
    rng = np.random.default_rng(0)
    groups = [_random_group(rng, shape, group) for group in like.groups[:2]]
    return Workload(
        "2B widths x 2 layers, 2 prompts x 4 rollouts", build_chunk(shape, world, std=0.02), groups, like.form
    )


def layers_of_2b(count: int) -> Qwen3VLShape:
    """The widths of 2B, ``count`` layers of each kind."""
    shape = preset("2B")
    vocab, image = 1024, 1000  # an embedding of the real size would be read at a few rows and fill the memory
    return dataclasses.replace(
        shape,
        text=dataclasses.replace(shape.text, num_layers=count, vocab=vocab),
        vision=dataclasses.replace(shape.vision, depth=count, taps=tuple(range(count))),
        image_token_id=image,
        video_token_id=image + 1,
    )


def _random_group(rng: np.random.Generator, shape: Qwen3VLShape, like: RolloutGroup) -> RolloutGroup:
    side = 8 * shape.vision.merge
    pixels = rng.standard_normal((side * side, shape.vision.patch_dim), dtype=np.float32)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(10, 900, count).tolist())

    def segments(answer: Response | Rollout) -> tuple[tuple[int, ...], Segments]:
        spans = [answer.segments.of_tower(tower) for tower in (0, 1)]
        first, second = (span.end - span.start for span in spans if span is not None)
        return tokens(first + second), Segments(Span(0, first), Span(first, first + second), None)

    visual = sum(t * h * w for image in like.prompt.images for t, h, w in [image.grid_thw]) // shape.vision.merge**2
    text = tokens(len(like.prompt.token_ids) - visual)
    prompt = Prompt(
        like.prompt.id, (*text[:3], *[shape.image_token_id] * 64, *text[3:]), (ImageInput(pixels, (1, side, side)),), ""
    )
    valid = [like.rollouts[r] for r in like.valid_rollouts[:4]]
    rollouts = []
    for rollout in valid:
        ids, found = segments(rollout)
        rollouts.append(dataclasses.replace(rollout, token_ids=ids, logprobs=(0.0,) * len(ids), segments=found))
    ids, found = segments(like.reference)
    reference = dataclasses.replace(like.reference, token_ids=ids, segments=found)
    return dataclasses.replace(like, prompt=prompt, reference=reference, rollouts=tuple(rollouts))


def build_chunk(shape: Qwen3VLShape, world: World, *, std: float, dtype: torch.dtype = torch.float32) -> MegatronModule:
    """The whole discriminator with random weights; dropout is left out, as every way would draw the same."""
    provider = DiscriminatorProvider(shape, Towers(), head_dropout=0.0)
    (chunk,) = build_chunks(provider, provider.transformer_config(ParallelConfig(), dtype), world, dtype)
    draw_weights(chunk, std=std)
    return chunk


def draw_weights(chunk: MegatronModule, *, std: float) -> None:
    """The same random weights for every module of these names and sizes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, std)


def run(work: Workload, way: Way, kind: str) -> Tensor:
    """One pass; the pairs' scores. Gradients are dropped again, so that every pass allocates its own."""
    for name, parameter in work.chunk.named_parameters():
        parameter.requires_grad_(kind == PASSES[2] or not name.startswith("vision_model."))
    if kind == PASSES[0]:
        with torch.no_grad():
            return way.score(work.chunk)
    scores = way.score(work.chunk)
    (-functional.logsigmoid(scores[0] - scores[1]).mean()).backward()
    work.chunk.zero_grad(set_to_none=True)
    return scores.detach()


def peak_bytes(action: Callable[[], object]) -> int:
    """Growth of the resident set while a forked child runs ``action``."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(600)
        LIBC.mallopt(M_MMAP_THRESHOLD, 65536)
        LIBC.malloc_trim(0)
        forget_peak()
        before = status_bytes("VmRSS")
        action()
        os.write(writing, str(status_bytes("VmHWM") - before).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return int(answer)


def forget_peak() -> None:
    """Let this process's peak start again from what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(field: str) -> int:
    """A field in bytes, from Linux's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; the benchmark needs Linux")


def bench(work: Workload, *, turns: int) -> bool:
    """Print every pass of every way; whether scores agree and the limits hold."""
    made = ways(work)
    print(f"\n{work.name}: {len(work.pairs())} pairs")
    holds = True
    for kind in PASSES:
        seconds: dict[str, list[float]] = {name: [] for name in made}
        scores: dict[str, Tensor] = {}
        for _ in range(turns):
            for name, way in made.items():
                begin = time.process_time()
                scores[name] = run(work, way, kind)
                seconds[name].append(time.process_time() - begin)
        fastest = {name: min(taken) for name, taken in seconds.items()}
        print(f"  {kind}")
        for name, way in made.items():
            error = float((scores[name] - scores[OURS]).abs().max() / scores[OURS].abs().max())
            memory = peak_bytes(partial(run, work, way, kind))
            holds &= error <= TOLERANCE
            print(
                f"    {name:18} {fastest[name]:8.3f} s  {fastest[name] / fastest[OURS]:5.2f} of ours  "
                f"{memory / 2**20:7.0f} MiB  {way.tokens:6} trunk tokens  {way.images:4} images  scores {error:.0e}",
                flush=True,
            )
        for names, limit in LIMITS.items():
            ratio = min(fastest[name] for name in names) / fastest[OURS]
            holds &= ratio >= limit
            verdict = "holds" if ratio >= limit else "DOES NOT HOLD"
            print(f"    {ratio:.2f} times as fast as {' and '.join(names)} (limit {limit}): {verdict}")
    return holds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["mini", "2B"], metavar="WORKLOAD", help="mini, 2B")
    parser.add_argument("--turns", type=int, default=1, help="of 2B; the mini takes three or more")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world = start(ParallelConfig(), seed=1)
    small = mini(world)
    results = []
    if "mini" in arguments.workloads:
        results.append(bench(small, turns=max(3, arguments.turns)))
    if "2B" in arguments.workloads:
        results.append(bench(wide(world, small), turns=arguments.turns))
    stop(world)
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
