"""What a policy's update costs at the paper's lengths, beside whole rows: time and memory.

    make bench-update-long                              one group of 16 answers, on one thread (over two hours, 16 GiB)
    python benchmarks/update_long.py --answers 4        a quarter of the time

A prompt of 1,500 tokens, 1,024 of them an image's, and answers of 4,900; the widths of 2B with its whole vocabulary and
two layers of each kind, random weights, the vision tower frozen. The ways:

    ours      an update of ``prism-rlvr``: micro-batches of 16,384 tokens, the prompt and its image read once for them
    whole     the same with a copy of prompt and image for every answer
    released  row by row with a copy of both, log-probs from whole logits, those before the update by a pass of their
              own, as trainers do it that the paper's third stage ran on

Each has a process of its own, one after the other, and takes no optimizer's step. Seconds are CPU time of one thread;
memory is the peak of the resident set beyond weights that have just been made. Gradients' norms must agree to 1e-4 of
the norm. All of it in fp32; not a GPU benchmark. The exit code is 1 where norms differ or released is faster.

No way can spare much here: of 16 answers' 102,400 tokens in whole rows 79,900 are left, and the output layer, which is
three quarters of the work beside two layers, is needed for every token of an answer.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.scoring import draw_weights, layers_of_2b, with_own_image
from benchmarks.scoring_long import (
    CAPTION,
    FAST,
    PROMPT,
    REASONING,
    STD,
    Gradients,
    Taken,
    alone,
    group_of,
    in_world,
    measured,
)
from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.presets import preset
from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.engine.batch import collate
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.runtime import World
from prism_megatron.training.batches import BatchFormat
from prism_megatron.training.experience import Experience, ExperienceRow
from prism_megatron.training.policy_update import UpdatePlan, update_policy
from prism_megatron.types import TokenSequence

TOLERANCE = 1e-4
BUDGET = 16384


def shape_of(layers: int) -> Qwen3VLShape:
    """The widths of 2B with all of its vocabulary."""
    shape = layers_of_2b(layers)
    return dataclasses.replace(shape, text=dataclasses.replace(shape.text, vocab=preset("2B").text.vocab))


def experience_of(shape: Qwen3VLShape, answers: int) -> Experience:
    """The group, every other answer of which was better than the rest."""
    group = group_of(shape, answers)
    return Experience(
        [
            ExperienceRow(group.prompt, rollout, [1.0 - 2.0 * (number % 2)] * len(rollout.token_ids))
            for number, rollout in enumerate(group.rollouts)
        ],
        version=0,
    )


def updated(world: World, shape: Qwen3VLShape, answers: int, *, share_prompts: bool) -> Taken:
    """An update by the engine."""
    provider = Qwen3VLProvider(shape, freeze=("vision", "projector"), execution=Execution(fast=FAST))
    engine = Gradients(
        name="policy", provider=provider, world=world, dtype=torch.float32, optimizer=OptimizerConfig(), total_steps=1,
        fast=FAST,
    )  # fmt: skip
    draw_weights(engine.modules[0], std=STD)
    form = BatchFormat(0, 1, 1, world.device, share_prompts=share_prompts)
    plan = UpdatePlan(PolicyObjective(family="clipped"), form, BUDGET)
    experience = experience_of(shape, answers)

    def step() -> tuple[int, dict[tuple[int, int | None], float]]:
        update = update_policy(engine, experience, plan, world=world)
        assert update.result is not None
        prompts = 1 if share_prompts else answers
        return prompts * PROMPT + experience.response_tokens, {(0, None): update.result.grad_norm}

    return measured(step)


def ours(world: World, shape: Qwen3VLShape, answers: int) -> Taken:
    """Prompts read once."""
    return updated(world, shape, answers, share_prompts=True)


def whole(world: World, shape: Qwen3VLShape, answers: int) -> Taken:
    """Prompts read with every answer."""
    return updated(world, shape, answers, share_prompts=False)


def released(world: World, shape: Qwen3VLShape, answers: int) -> Taken:
    """Plain rows: log-probs before the update first, then forward and backward."""
    provider = Qwen3VLProvider(shape, freeze=("vision", "projector"))
    config = provider.transformer_config(ParallelConfig(), torch.float32)
    chunk = provider.build_chunk(config, world.groups, pre_process=True, post_process=True, vp_stage=None)
    draw_weights(chunk, std=STD)
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(not name.startswith("vision_model."))
    experience = experience_of(shape, answers)

    def logprobs(row: ExperienceRow) -> Tensor:
        prompt, answer = row.prompt, row.rollout.token_ids
        sequence = with_own_image(TokenSequence((*prompt.token_ids, *answer), prompt.images))
        batch = collate([sequence], pad_token_id=0, multiple_of=1, device=world.device)
        output = chunk(batch)
        predicting = output.hidden_L_B_H[len(prompt.token_ids) - 1 : -1]
        logits = dataclasses.replace(output, hidden_L_B_H=predicting).logits()[:, 0]
        return torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])[:, 0]

    def step() -> tuple[int, dict[tuple[int, int | None], float]]:
        with torch.no_grad():
            old = [logprobs(row) for row in experience.rows]
        for row, before in zip(experience.rows, old, strict=True):
            ratio = (logprobs(row) - before).exp()
            worth = torch.tensor(row.advantages)
            objective = torch.minimum(ratio * worth, ratio.clamp(0.8, 1.2) * worth)
            (-objective.sum() / experience.response_tokens).backward()
        norms = [parameter.grad.norm() for parameter in chunk.parameters() if parameter.grad is not None]
        tokens = sum(len(row.prompt.token_ids) + len(row.rollout.token_ids) for row in experience.rows)
        return 2 * tokens, {(0, None): float(torch.stack(norms).norm())}

    return measured(step)


WAYS: dict[str, Callable[[World, Qwen3VLShape, int], Taken]] = {"ours": ours, "whole": whole, "released": released}


def take(name: str, layers: int, answers: int) -> Taken:
    """A way in this process, which it has to itself."""
    return in_world(lambda world: WAYS[name](world, shape_of(layers), answers))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--answers", type=int, default=16)
    arguments = parser.parse_args()
    print(f"2B widths x {arguments.layers} layers: prompt {PROMPT}, {arguments.answers} answers of "
          f"{CAPTION + REASONING}", flush=True)  # fmt: skip
    found = {}
    for name in WAYS:
        found[name] = taken = alone(take, name, arguments.layers, arguments.answers)
        print(f"  {name:9} {taken.seconds:8.1f} s  {taken.peak_bytes / 2**30:6.2f} GiB  {taken.trunk_tokens:7} tokens "
              f"forward, {taken.seconds / found['ours'].seconds:.2f} of ours", flush=True)  # fmt: skip
    norms = [next(iter(taken.scores.values())) for taken in found.values()]
    apart = (max(norms) - min(norms)) / max(norms)
    print(f"  norms of the gradient differ by {apart:.0e} (limit {TOLERANCE:.0e})")
    return 0 if found["released"].seconds >= found["ours"].seconds and apart <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
