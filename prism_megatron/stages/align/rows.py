"""What one alignment step reports, as one flat row. A share without data is None beside a count of 0."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prism_megatron.config.stages.game import GameConfig
from prism_megatron.data.loader import Example
from prism_megatron.data.render import Renderer
from prism_megatron.engine.provider import StepResult
from prism_megatron.evaluation.health import Figures, tower_figures
from prism_megatron.evaluation.sample import Sample
from prism_megatron.evaluation.scenes import SceneJudgement, item_accuracy
from prism_megatron.game.controls import Decision, Observation, Verdict
from prism_megatron.game.credit import GroupCredit
from prism_megatron.game.figures import cost_row, game_row, judged_groups, rights_of, truths_of
from prism_megatron.game.judge import Judgement
from prism_megatron.game.samples import game_samples
from prism_megatron.game.unlearned import ALL_LEFT_OUT, SCORES_NOT_FINITE, why_none_is_valid
from prism_megatron.parallel.collectives import broadcast_object
from prism_megatron.run.stage import Outcome
from prism_megatron.sampling.queue import SampledStep
from prism_megatron.stages.align.held_out import Seen
from prism_megatron.stages.align.plan import AlignPlan
from prism_megatron.training.figures import (
    NOT_FINITE,
    correction_row,
    gap_alarms,
    gap_row,
    importance_row,
    ratio,
    update_row,
)
from prism_megatron.training.policy_update import PolicyUpdate
from prism_megatron.types import TOWER_NAMES, TOWERS, PreferenceGroup, RolloutGroup


@dataclass(frozen=True)
class AlignStep:
    """Everything one step produced; observers read it and change nothing. ``None`` results mean "not updated".

    After the verdict "roll back" both players are those of the last good checkpoint again.
    """

    step: int
    sampled: SampledStep
    replayed: Sequence[PreferenceGroup]
    decision: Decision
    judgement: Judgement
    credits: Sequence[GroupCredit]
    policy: PolicyUpdate
    verdict: Verdict

    @property
    def examples(self) -> Sequence[Example]:
        return self.sampled.examples

    @property
    def groups(self) -> Sequence[RolloutGroup]:
        return self.sampled.groups

    @property
    def sampled_version(self) -> int:
        """Oldest version of the policy that sampled: the number of the last step that updated it."""
        return min(version for credit in self.credits for version in credit.policy_versions)

    @property
    def discriminator_version(self) -> int:
        """The discriminator that judged all groups of the step."""
        return self.credits[0].discriminator_version

    def samples(self, renderer: Renderer) -> list[Sample]:
        """What the report shows of it."""
        return game_samples(self.examples, self.groups, self.judgement, renderer)


def step_row(step: AlignStep, renderer: Renderer) -> Figures:
    """Figures of the whole step, equal on every rank."""
    rollouts = [rollout for group in step.groups for rollout in group.rollouts]
    num_valid = sum(len(group.valid_rollouts) for group in step.groups)
    num_replayed = sum(len(group.valid_rollouts) for group in step.replayed)
    truths = truths_of(step.examples, step.groups, renderer)
    row: Figures = {
        "step": step.step,
        "policy_version": policy_version(step),
        "sampled_version": step.sampled_version,
        "discriminator_version": step.discriminator_version,
        "staleness/mean": step.sampled.staleness.mean_updates,
        "staleness/max": step.sampled.staleness.max_updates,
        "off_policy_share": step.sampled.staleness.off_policy_share,
        "rollouts": len(rollouts),
        "valid_rollouts": num_valid,
        "valid_share": ratio(num_valid, len(rollouts)),
        "replayed_rollouts": num_replayed,
        "truncated_rollouts": sum(rollout.finish_reason == "length" for rollout in rollouts),
        "response_tokens": sum(len(rollout.token_ids) for rollout in rollouts),
        "unrewarded_step": int(num_valid == 0),
        "discriminator_updates": len(step.judgement.results),
        "rolled_back": int(step.verdict == "roll back"),
        "settled": int(step.verdict == "stop"),
    }
    row |= advantage_row(step)
    row |= game_row(step.groups, step.judgement, rights_of(step.examples, step.groups, renderer))
    row |= cost_row(step.judgement.cost)
    own = ("gap/", "importance/", "correction/")
    row |= {name: value for name, value in step.policy.sums.items() if not name.startswith(own)}
    row |= gap_row(step.policy.sums) | importance_row(step.policy.sums) | correction_row(step.policy.sums)
    row |= update_row("discriminator", step.judgement.result) | update_row("policy", step.policy.result)
    return row | truth_row([one for group in truths if group is not None for one in group])


def policy_version(step: AlignStep) -> int:
    """Version of the policy after the step: the number of steps played when it last changed."""
    changed = step.verdict == "roll back" or step.policy.updated
    return step.step + 1 if changed else step.sampled.version


def advantage_row(step: AlignStep) -> Figures:
    """Groups whose advantages are a special case, and scores beyond the clip."""
    groups = [credit.advantages for credit in step.credits]
    return {
        "all_invalid_groups": sum(group.all_invalid for group in groups),
        "one_valid_groups": sum(group.num_valid == 1 for group in groups),
        "flat_rewards": sum(group.num_flat for group in groups),
        "clipped_scores": sum(group.num_clipped_scores for group in groups),
    }


def verdict_lines(step: AlignStep, game: GameConfig) -> list[str]:
    """What the controls did, in words."""
    done = step.step + 1
    if step.verdict == "roll back":
        return [f"ALARM in step {done}: the game has collapsed; both players go back (--rollbacks)"]
    if step.verdict == "stop":
        moved = f"every tower's reward gap moved by at most {game.stop_gap_band:g} over {game.stop_gap_steps} steps"
        return [f"{moved}: the run ends after step {done} (--stop-gap-band)"]
    return []


def observation_of(
    groups: Sequence[RolloutGroup], judgement: Judgement, policy_result: StepResult | None
) -> Observation:
    """What the controls look at, as rank 0 has it: ranks must not decide apart over the last digit of a float."""
    rollouts = sum(len(group.rollouts) for group in groups)
    results = [*judgement.results, *([] if policy_result is None else [policy_result])]
    figures = {
        name: tower_figures(judged_groups(groups, judgement.scores, [None] * len(groups), tower))
        for tower, name in zip(TOWERS, TOWER_NAMES, strict=True)
    }
    seen = Observation(
        accuracies={name: own["accuracy"] for name, own in figures.items()},
        reward_gaps={name: own["reward_gap"] for name, own in figures.items()},
        valid_share=sum(len(group.valid_rollouts) for group in groups) / rollouts,
        discriminator_updated=any(result.updated for result in judgement.results),
        finite_scores=judgement.finite,
        finite_gradients=all(result.updated for result in results),
    )
    return broadcast_object(seen, source=0)


def outcome_of(step: AlignStep, seen: Seen, plan: AlignPlan, renderer: Renderer, *, good: bool) -> Outcome:
    """What the driver learns of a step, and of what was ``seen`` of held-out prompts after it."""
    row = step_row(step, renderer) | seen.row
    lines = [*gap_alarms(row, plan.logprob_gap_alarm), *verdict_lines(step, plan.game), *seen.lines]
    verdict: Literal["go on", "stop"] = "stop" if step.verdict == "stop" else "go on"
    learned, idle = who_learned(step, renderer)
    return Outcome(row, verdict, good=good, best=seen.best, lines=lines, learned=learned, idle=idle)


def who_learned(step: AlignStep, renderer: Renderer) -> tuple[Sequence[str], dict[str, str]]:
    """The players that an update changed; and those that were to learn and did not, with the reason."""
    if step.verdict == "roll back":
        return (), {}
    unlearned = why_none_is_valid(step.groups, renderer)
    updated = {
        "policy": step.policy.updated,
        "discriminator": any(result.updated for result in step.judgement.results),
    }
    idle = {}
    if step.decision.update_policy and not updated["policy"]:
        left_out = ALL_LEFT_OUT if step.policy.sums.get("correction/kept_tokens") == 0 else None
        idle["policy"] = unlearned or left_out or (NOT_FINITE if step.judgement.finite else SCORES_NOT_FINITE)
    if step.decision.discriminator_updates and not updated["discriminator"]:
        idle["discriminator"] = unlearned or NOT_FINITE
    return [role for role, changed in updated.items() if changed], idle


def truth_row(judged: Sequence[SceneJudgement]) -> Figures:
    """Means over responses; empty where none was judged."""
    if not judged:
        return {}
    return {
        "truth/responses": len(judged),
        "truth/item_accuracy": statistics.fmean(item_accuracy(one) for one in judged),
        "truth/caption_exact": statistics.fmean(one.caption_exact for one in judged),
        "truth/step_validity": statistics.fmean(one.step_validity for one in judged),
        "truth/reasoning_exact": statistics.fmean(one.reasoning_exact for one in judged),
        "truth/answer_right": statistics.fmean(one.answer_right for one in judged),
        "truth/items": statistics.fmean(one.num_items for one in judged),
    }
