"""What one alignment step reports, as one flat row. A share without data is None beside a count of 0."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from PIL import Image

from prism_megatron.data.images import open_image
from prism_megatron.data.loader import Example
from prism_megatron.data.render import Renderer
from prism_megatron.evaluation.report import Sample
from prism_megatron.evaluation.scenes import SceneJudgement, judge
from prism_megatron.stages.align import AlignStep
from prism_megatron.stages.batches import TOWER_NAMES, TOWERS
from prism_megatron.stages.judge import TrunkCost

Row = dict[str, float | int | None]
PROMPT_KINDS = ("text", "image")


def share(total: float, count: float) -> float | None:
    """``total / count``, or None where there is nothing to divide."""
    return total / count if count else None


def step_row(step: AlignStep, renderer: Renderer) -> Row:
    """Figures of the whole step, equal on every rank."""
    rollouts = [rollout for group in step.groups for rollout in group.rollouts]
    num_valid = sum(rollout.segments.valid for rollout in rollouts)
    row: Row = {
        "step": step.step,
        "policy_version": step.step + 1 if step.policy_result and step.policy_result.updated else step.sampled.version,
        "sampled_version": step.sampled_version,
        "staleness/mean": step.sampled.staleness.mean_updates,
        "staleness/max": step.sampled.staleness.max_updates,
        "off_policy_share": step.sampled.staleness.off_policy_share,
        "rollouts": len(rollouts),
        "valid_rollouts": num_valid,
        "valid_share": share(num_valid, len(rollouts)),
        "truncated_rollouts": sum(rollout.finish_reason == "length" for rollout in rollouts),
        "response_tokens": sum(len(rollout.token_ids) for rollout in rollouts),
        "all_invalid_groups": sum(advantages.all_invalid for advantages in step.advantages),
        "unrewarded_step": int(num_valid == 0),
        "clipped_scores": sum(advantages.num_clipped_scores for advantages in step.advantages),
    }
    row |= game_row(step.judgement.sums) | cost_row(step.judgement.cost, pairs=num_valid)
    row |= {name: value for name, value in step.policy_sums.items() if not name.startswith(("gap/", "importance/"))}
    row |= gap_row(step.policy_sums) | importance_row(step.policy_sums)
    for role, result in (("discriminator", step.judgement.result), ("policy", step.policy_result)):
        row[f"{role}_grad_norm"] = None if result is None else result.grad_norm
        row[f"{role}_lr"] = None if result is None else result.lr
        row[f"{role}_updated"] = None if result is None else int(result.updated)
    return row | scene_row(step, renderer)


def game_row(sums: Mapping[str, float]) -> Row:
    """Per tower: pairs, accuracy (a tie is one half), reward gap and mean scores, from the discriminator's sums."""
    row: Row = {"discriminator_loss": sums["discriminator_loss"]}
    for tower in TOWER_NAMES:
        pairs = sums[f"{tower}/pairs"]
        row[f"{tower}/pairs"] = int(pairs)
        row[f"{tower}/accuracy"] = share(sums[f"{tower}/correct"], pairs)
        row[f"{tower}/reward_gap"] = share(sums[f"{tower}/margin"], pairs)
        row[f"{tower}/reference_score"] = share(sums[f"{tower}/reference_score"], pairs)
        row[f"{tower}/rollout_score"] = share(sums[f"{tower}/rollout_score"], pairs)
    return row


def cost_row(cost: TrunkCost, *, pairs: int) -> Row:
    """What the discriminator's pass ran: tokens through the trunk, tokens judged, and rollouts to a reference."""
    return {
        "discriminator/trunk_tokens": cost.trunk_tokens,
        "discriminator/unique_tokens": cost.unique_tokens,
        "discriminator/rollouts_per_reference": pairs / cost.references,
    }


def gap_row(sums: Mapping[str, float]) -> Row:
    """|Rollout - trainer| log-prob a token drawn by the policy that trains: mean, then by kind of prompt."""
    tokens = {kind: sums[f"gap/{kind}/tokens"] for kind in PROMPT_KINDS}
    row: Row = {"logprob_gap": share(sum(sums[f"gap/{kind}/sum"] for kind in PROMPT_KINDS), sum(tokens.values()))}
    for kind, count in tokens.items():
        row[f"logprob_gap/{kind}/tokens"] = int(count)
        row[f"logprob_gap/{kind}/mean"] = share(sums[f"gap/{kind}/sum"], count)
        row[f"logprob_gap/{kind}/max"] = sums[f"gap/{kind}/max"] if count else None
        row[f"logprob_gap/{kind}/kl"] = share(sums[f"gap/{kind}/kl"], count)
    return row


def importance_row(sums: Mapping[str, float]) -> Row:
    """Importance weights of the step's tokens; all 1 but for rounding where the policy that trains drew them.

    ``effective_share`` is the effective sample size as a share of the tokens: (sum w)² / (tokens · sum w²).
    """
    tokens, total = sums["importance/tokens"], sums["importance/sum"]
    return {
        "importance/mean": share(total, tokens),
        "importance/max": sums["importance/max"] if tokens else None,
        "importance/truncated_share": share(sums["importance/truncated"], tokens),
        "importance/effective_share": share(total**2, tokens * sums["importance/squares"]),
    }


def gap_alarms(row: Row, threshold: float) -> list[str]:
    """One line for each kind of prompt whose mean gap is above ``threshold``, or is not a number."""
    lines = []
    for kind in PROMPT_KINDS:
        mean, largest, kl = (row[f"logprob_gap/{kind}/{figure}"] for figure in ("mean", "max", "kl"))
        if mean is not None and not mean <= threshold:
            lines.append(
                f"ALARM in step {int(row['step'] or 0) + 1}: "
                f"log-probs of rollouts and trainer differ by {mean:.3g} a token for "
                f"{kind} prompts (largest {largest:.3g}, KL {kl:.3g}), above --logprob-gap-alarm {threshold:g}: the "
                "rollout engine may not run the trainer's policy"
            )
    return lines


def scene_row(step: AlignStep, renderer: Renderer) -> Row:
    """How right the rollouts are, where the truth is known (scenes); nothing for records."""
    judged = [
        judge(example.scene, renderer.decode(rollout.token_ids))
        for example, group in zip(step.examples, step.groups, strict=True)
        if example.scene is not None
        for rollout in group.rollouts
    ]
    return truth_row(judged)


def truth_row(judged: Sequence[SceneJudgement]) -> Row:
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


def item_accuracy(judgement: SceneJudgement) -> float:
    """Right caption items over the larger of items written and items in the scene: omitting and padding both cost."""
    return judgement.items_right / max(judgement.num_items, judgement.items_in_scene)


def report_samples(step: AlignStep, renderer: Renderer, *, count: int = 3) -> list[Sample]:
    """The first rollout of the first ``count`` groups, with the scores that trained the policy."""
    samples = []
    for g, (example, group) in enumerate(zip(step.examples[:count], step.groups, strict=False)):
        rollout, scores = group.rollouts[0], step.judgement.scores
        samples.append(
            Sample(
                images=[image_of(example)],
                prompt=group.prompt.question,
                response=renderer.decode(rollout.token_ids),
                reference=renderer.decode(group.reference.token_ids),
                problem=rollout.segments.problem,
                scores={name: scores.get((g, t, 0)) for t, name in zip(TOWERS, TOWER_NAMES, strict=True)},
                reference_scores={name: scores.get((g, t, None)) for t, name in zip(TOWERS, TOWER_NAMES, strict=True)},
            )
        )
    return samples


def image_of(example: Example) -> Image.Image:
    """The picture a prompt shows, as its source has it."""
    if example.scene is not None:
        return example.scene.image()
    assert example.record is not None, "an example comes from a scene or from a record"
    return open_image(example.record.image)
