"""Our side: embedded rollouts, advantages and the policy's update as ``prism-rlvr`` has them, in one process."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from benchmarks.grpo_sides.group import LR, NEW_TOKENS, PROMPTS, SAMPLES, checksum, prompts_of
from benchmarks.sft_sides.rounds import Rounds, all_rows
from prism_megatron.advantages import reward_advantages
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.data.render import Renderer
from prism_megatron.engine.runtime import start
from prism_megatron.rollout.base import SampleRequest, Sampling
from prism_megatron.rollout.embedded import EmbeddedRollout
from prism_megatron.sampling.handover import Handover
from prism_megatron.training.experience import Experience, ExperienceRow
from prism_megatron.training.policy_update import UpdatePlan, update_policy
from prism_megatron.training.roles import DTYPES, batch_format, build_policy
from prism_megatron.types import Segments

_TOKENS_PER_MICROBATCH = {"tiny": 16384, "31M": 4096}


class NothingToFind:
    """Answers have no form here, and none ends before its length."""

    def find(self, token_ids: Sequence[int]) -> Segments:
        del token_ids
        return Segments(None, None, "not looked at")

    def watch(self) -> NothingToFind:
        return self

    def add(self, token_id: int) -> bool:
        del token_id
        return False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("model")
    parser.add_argument("dtype", choices=("fp32", "bf16"))
    parser.add_argument("way", choices=("shared", "whole"), help="prompts read once for a group, or for each answer")
    parser.add_argument("steps", type=int)
    arguments = parser.parse_args()
    rounds = Rounds()
    torch.set_num_threads(1)
    folder, dtype = arguments.work / arguments.model, DTYPES[arguments.dtype]
    world = start(ParallelConfig(), seed=1)
    renderer, shape = Renderer.from_folder(folder, system_prompt=None), Qwen3VLShape.from_folder(folder)
    policy = build_policy(
        folder, shape, world=world, dtype=dtype, optimizer=OptimizerConfig(lr=LR, weight_decay=0.0),
        total_steps=arguments.steps,
    )  # fmt: skip
    # No answer ends before it has all its tokens: the video token is never sampled.
    rollout = EmbeddedRollout(
        folder, NothingToFind(), end_token_ids=[shape.video_token_id], device=world.device, dtype=dtype
    )
    handover = Handover(policy, rollout)
    form = batch_format(renderer, world, share_prompts=arguments.way == "shared")
    plan = UpdatePlan(PolicyObjective(family="clipped"), form, _TOKENS_PER_MICROBATCH[arguments.model])
    rows = all_rows(arguments.work)
    handover(0, changed_only=False)
    rounds.begin()
    for step in range(arguments.steps):
        began = time.perf_counter()
        asked = [rows[number] for number in prompts_of(step, len(rows))]
        prompts = [
            renderer.prompt(
                row["id"],
                row["messages"][0]["content"].removeprefix("<image>"),
                [Image.open(arguments.work / "records" / row["images"][0])],
            )
            for row in asked
        ]
        sampling = Sampling(max_new_tokens=NEW_TOKENS)
        groups = rollout.generate(SampleRequest(prompts, SAMPLES, sampling, seed=1, step=step))
        sampled = time.perf_counter()
        rewards = [
            torch.tensor([[checksum(renderer.decode(answer.token_ids)) for answer in group]]) for group in groups
        ]
        advantages = reward_advantages(rewards, [1.0], form="group")
        experience = Experience(
            [
                ExperienceRow(prompt, answer, [float(advantage)] * len(answer.token_ids))
                for prompt, group, worth in zip(prompts, groups, advantages, strict=True)
                for answer, advantage in zip(group, worth, strict=True)
            ],
            version=step,
        )
        update = update_policy(policy, experience, plan, world=world)
        updated = time.perf_counter()
        handover(step + 1)
        assert experience.response_tokens == PROMPTS * SAMPLES * NEW_TOKENS
        rounds.took(
            update.sums["policy_loss"],
            tokens=experience.response_tokens,
            labels=len(experience.rows),
            ids=sum(sum(prompt.token_ids) for prompt in prompts),
            prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts),
            parts={"rollout": sampled - began, "update": updated - sampled, "hand-over": time.perf_counter() - updated},
        )


if __name__ == "__main__":
    main()
