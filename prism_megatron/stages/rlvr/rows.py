"""What one step of reinforcement learning from verifiable rewards reports, as one flat row."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from prism_megatron.data.render import Renderer
from prism_megatron.evaluation.health import Figures
from prism_megatron.evaluation.sample import MAX_SAMPLES, Sample, png_url
from prism_megatron.rewards.rewarder import Rewarded
from prism_megatron.run.stage import Outcome
from prism_megatron.sampling.exam import Sitting
from prism_megatron.sampling.rewarding import gold_of
from prism_megatron.stages.rlvr.plan import RLVRPlan
from prism_megatron.stages.rlvr.prospect import Found, RewardedGroup
from prism_megatron.training.figures import (
    NOT_FINITE,
    correction_row,
    gap_alarms,
    gap_row,
    importance_row,
    ratio,
    update_row,
)
from prism_megatron.training.policy_update import PolicyUpdate, update_figures

_OF_ROLLOUTS = ("gap/", "importance/", "correction/", "ratio/", "clip/", "kl/")
_NOTHING_TO_TEACH = "no group of the step has answers of different worth"


@dataclass(frozen=True)
class RLVRStep:
    """Everything one step produced; observers read it and change nothing."""

    step: int
    found: Found
    rewards: Sequence[Sequence[float]]
    """of the answers that were learned from, by group"""
    update: PolicyUpdate | None
    """None where there was nothing to learn from"""
    held_out: Sitting


def outcome_of(step: RLVRStep, plan: RLVRPlan) -> Outcome:
    """What the driver learns of a step."""
    row = step_row(step)
    idle = {}
    if step.update is None:
        idle["policy"] = _NOTHING_TO_TEACH
    elif not step.update.updated:
        idle["policy"] = NOT_FINITE
    lines = [] if step.update is None else gap_alarms(row, plan.logprob_gap_alarm)
    lines += scarcity_lines(step, plan)
    return Outcome(row, best=step.held_out.best, learned=() if idle else ("policy",), idle=idle, lines=lines)


def scarcity_lines(step: RLVRStep, plan: RLVRPlan) -> list[str]:
    """One line where all batches that a step may ask had fewer groups than it wanted."""
    found, wanted = len(step.found.groups), plan.prompts_per_step
    if found >= wanted:
        return []
    counts = step.found.counts()
    line = (
        f"step {step.step + 1}: {found} of {wanted} groups after {len(step.found.batches)} batches of prompts: of "
        f"{len(step.found.asked)} groups {counts['all_right']} are all right and {counts['none_right']} all wrong; ask "
        "more with --max-batches, or choose prompts by tools/select_prompts.py"
    )
    return [line]


def step_row(step: RLVRStep) -> Figures:
    """Figures of the whole step, equal on every rank."""
    found = step.found
    rollouts = [rollout for one in found.asked for rollout in one.group.rollouts]
    stale = [batch.staleness for batch in found.batches]
    sizes = [sum(len(group.rollouts) for group in batch.groups) for batch in found.batches]
    updated = step.update is not None and step.update.updated
    row: Figures = {
        "step": step.step,
        "policy_version": step.step + 1 if updated else found.version,
        "sampled_version": min(rollout.policy_version for rollout in rollouts),
        "staleness/mean": sum(one.mean_updates * n for one, n in zip(stale, sizes, strict=True)) / sum(sizes),
        "staleness/max": max(one.max_updates for one in stale),
        "rollouts": len(rollouts),
        "truncated_rollouts": sum(rollout.finish_reason == "length" for rollout in rollouts),
        "response_tokens": sum(len(rollout.token_ids) for rollout in rollouts),
    }
    row |= reward_row(step) | found_row(found)
    if step.update is not None:
        sums = step.update.sums
        row |= {name: value for name, value in sums.items() if not name.startswith(_OF_ROLLOUTS)}
        row |= gap_row(sums) | importance_row(sums) | correction_row(sums) | update_figures(step.update)
    row |= update_row("policy", None if step.update is None else step.update.result)
    return row | step.held_out.row


def found_row(found: Found) -> Figures:
    """What it took to find what is learned from."""
    counts = found.counts()
    return {
        "groups": len(found.asked),
        "groups/learned": len(found.groups),
        "groups/mixed": counts["mixed"],
        "groups/all_right": counts["all_right"],
        "groups/none_right": counts["none_right"],
        "groups/surplus": found.surplus,
        "groups/batches": len(found.batches),
    }


def reward_row(step: RLVRStep) -> Figures:
    """What all answers of the step are worth, and how checking them went."""
    found = [one for group in step.found.asked for one in group.rewards]
    valid = sum(one.read.valid for one in found)
    rewards = [reward for of_group in step.rewards for reward in of_group]
    return {
        "valid_rollouts": valid,
        "valid_share": ratio(valid, len(found)),
        "reward/accuracy": ratio(sum(one.reward.answer > 0 for one in found), len(found)),
        "reward/learned": len(rewards),
        "reward/mean": statistics.fmean(rewards) if rewards else None,
        "reward/guarded": sum(one.verdict.guarded for one in found),
        "reward/killed": sum(one.verdict.killed for one in found),
        "reward/slowest_seconds": max(one.verdict.seconds for one in found),
    }


def shown(found: Found, renderer: Renderer) -> list[Sample]:
    """The first answers of the step's first groups, each with what was made of it."""
    return [
        Sample(
            images=[png_url(renderer.preprocessor.picture(image)) for image in one.group.prompt.images],
            prompt=one.group.prompt.question,
            response=renderer.decode(one.group.rollouts[0].token_ids),
            reference=_verdict_text(one, one.rewards[0]),
            problem=one.rewards[0].read.problem or None,
            scores=dict(one.rewards[0].reward.components),
        )
        for one in found.asked[:MAX_SAMPLES]
    ]


def _verdict_text(one: RewardedGroup, rewarded: Rewarded) -> str:
    verdict = rewarded.verdict
    said = f"{'right' if verdict.right else 'wrong'} ({verdict.kind}{', ' if verdict.reason else ''}{verdict.reason})"
    gold, _ = gold_of(one.example)
    return f"{gold}; the answer {rewarded.read.answer!r} is {said}; {one.right} of {len(one.rewards)} are right"
