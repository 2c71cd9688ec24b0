"""Every metric of ``metrics.jsonl``: its name, what it means, and the count that weights it in a mean over steps.

A figure without data is null, beside a count of 0. ``{tower}`` stands for perception and reasoning, ``{role}`` for
policy and discriminator, ``{mode}`` for how held-out prompts are answered, ``{kind}`` for text and image prompts,
``{expert}`` and ``{phase}`` for whatever the run has.
The page ``docs/metrics.md`` is made of this: ``python -m prism_megatron.observability.catalogue > docs/metrics.md``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from prism_megatron.types import TOWER_NAMES

ROLES = ("policy", "discriminator")
PROMPT_KINDS = ("text", "image")
_HELD_OUT = "probe/"
_STANDS_FOR = {
    "tower": "|".join(TOWER_NAMES),
    "role": "|".join(ROLES),
    "kind": "|".join(PROMPT_KINDS),
    "expert": "[0-9]+",
    "source": ".+",
    "mode": "greedy|sampled",
    "phase": "[a-z_]+",
}


@dataclass(frozen=True)
class Metric:
    """What a figure of one step says. ``counted_by`` names the metric that weights it in a mean over steps."""

    meaning: str
    counted_by: str | None = None


METRICS: Mapping[str, Mapping[str, Metric]] = {
    "The step": {
        "step": Metric("number of the step, from 0"),
        "policy_version": Metric("number of steps played when the policy last changed, after this one"),
        "sampled_version": Metric("the oldest such version of the policy that drew the step's rollouts"),
        "discriminator_version": Metric("the same of the discriminator that judged them"),
        "seconds/{phase}": Metric("seconds that a phase of the step took"),
        "time": Metric("when the step was over, ISO 8601 in UTC"),
        "memory/host_gib": Metric("GiB of host memory that a rank holds (resident set), the largest of all ranks"),
        "memory/gpu_gib": Metric("GiB of tensors on a rank's GPU at most since the last row; null without CUDA"),
    },
    "Rollouts": {
        "rollouts": Metric("answers of the step"),
        "valid_rollouts": Metric("answers that keep the format"),
        "valid_share": Metric("their share", "rollouts"),
        "truncated_rollouts": Metric("answers cut at --max-response-tokens"),
        "replayed_rollouts": Metric("valid answers of earlier steps among the discriminator's pairs"),
        "response_tokens": Metric("tokens of all answers"),
        "staleness/mean": Metric("updates of the policy between drawing an answer and training on it", "rollouts"),
        "staleness/max": Metric("the most of them"),
        "off_policy_share": Metric("share of tokens drawn by an earlier policy than the one that trains"),
    },
    "Verifiable rewards": {
        "reward/accuracy": Metric("share of answers that are right", "rollouts"),
        "reward/mean": Metric("mean reward of the answers that were learned from", "reward/learned"),
        "reward/learned": Metric("such answers"),
        "reward/guarded": Metric("checks of answers that a static guard refused, as wrong"),
        "reward/killed": Metric("checks that took too long and were ended, as wrong"),
        "reward/slowest_seconds": Metric("seconds of the longest check"),
        "groups": Metric("prompts that were asked"),
        "groups/learned": Metric("those whose answers were learned from"),
        "groups/mixed": Metric("those with right and wrong answers"),
        "groups/all_right": Metric("those whose answers are all right"),
        "groups/none_right": Metric("those whose answers are all wrong"),
        "groups/surplus": Metric("those that would have been learned from, beyond --prompts-per-step"),
        "groups/batches": Metric("batches of prompts that were asked (--max-batches)"),
    },
    "Held-out prompts": {
        "eval/prompts": Metric("prompts that were asked, once greedily and --eval-rollouts times by sampling"),
        "eval/{mode}/accuracy": Metric("share of right answers (mean@k of samples)", "eval/prompts"),
        "eval/{mode}/pass": Metric("share of prompts with a right answer among the samples (pass@k)", "eval/prompts"),
        "eval/{mode}/format": Metric("share of valid responses", "eval/prompts"),
        "eval/{mode}/tokens": Metric("mean tokens of an answer", "eval/prompts"),
    },
    "The game, tower by tower": {
        "{tower}/pairs": Metric("pairs of a reference and a valid answer"),
        "{tower}/accuracy": Metric("share of pairs ranked right before the update; a tie is one half", "{tower}/pairs"),
        "{tower}/reward_gap": Metric("reference score less answer score, before the update", "{tower}/pairs"),
        "{tower}/auc": Metric(
            "does it score right answers above wrong ones of the same prompt? Only this reaches the policy. Known for "
            "the mini's scenes, and in reasoning for records, by their final answer",
            "{tower}/auc_pairs",
        ),
        "{tower}/auc_pairs": Metric("pairs of a right and a wrong answer to one prompt"),
        "{tower}/reference_count": Metric("references scored"),
        "{tower}/reference_score": Metric("their mean score; advantages ignore its level", "{tower}/reference_count"),
        "{tower}/reference_std": Metric("their unbiased standard deviation", "{tower}/reference_count"),
        "{tower}/rollout_score": Metric("mean score of valid answers", "{tower}/pairs"),
        "{tower}/rollout_std": Metric("their unbiased standard deviation", "{tower}/pairs"),
        "{tower}/length_correlation": Metric(
            "score against length of the segment, inside groups (Pearson)", "{tower}/length_correlation_count"
        ),
        "{tower}/length_correlation_count": Metric("answers in groups with at least two valid ones"),
        "{tower}/expert_load/{expert}": Metric("share of the tower's tokens that an expert got"),
        "{tower}/expert_entropy": Metric("evenness of the experts' load; 1 is even"),
        "tower_agreement": Metric("do both towers rank a group's answers alike? (Spearman)", "tower_agreement_groups"),
        "tower_agreement_groups": Metric("groups in which both towers rank at least two answers"),
    },
    "Groups and scores that teach little": {
        "all_invalid_groups": Metric("groups without a valid answer"),
        "one_valid_groups": Metric("groups with one valid answer, whose advantage is 0"),
        "flat_rewards": Metric("groups, tower by tower, whose scores are all equal"),
        "clipped_scores": Metric("scores beyond --score-clip"),
        "unrewarded_step": Metric("1 where no answer of the step was valid, so that the policy was only measured"),
    },
    "Updates": {
        "{role}_updated": Metric("1 where the optimizer took its step, 0 where a gradient was not finite"),
        "{role}_grad_norm": Metric("gradient norm before the clip"),
        "{role}_lr": Metric("learning rate of the update"),
        "policy_updates": Metric("updates of the policy in this step"),
        "policy_grad_norm/mean": Metric("mean gradient norm of these updates"),
        "policy_grad_norm/max": Metric("the largest"),
        "ratio/mean": Metric("probability of a token under the policy over that before the step, mean"),
        "ratio/max": Metric("the largest"),
        "ratio/kl": Metric("KL divergence (k3 estimate) from the policy before the step, a token"),
        "clip/low_share": Metric("share of tokens whose ratio the lower bound holds"),
        "clip/high_share": Metric("share of tokens whose ratio the upper bound holds"),
        "clip/dual_share": Metric("share of tokens that the dual clip holds"),
        "kl/reference": Metric("divergence from the reference policy (--kl), a token"),
        "policy_loss": Metric("the policy's loss, a mean over response tokens"),
        "entropy": Metric("entropy of the policy's next token, a mean over response tokens", "response_tokens"),
        "discriminator_loss": Metric("the discriminator's loss on the step's pairs"),
        "discriminator_updates": Metric("updates of the discriminator in this step"),
        "rolled_back": Metric("1 where both players went back to a checkpoint (--rollbacks)"),
        "settled": Metric("1 where the reward gaps have settled and the run ends (--stop-gap-band)"),
    },
    "Do rollout engine and trainer agree?": {
        "logprob_gap": Metric("|rollout - trainer| log-prob a token, of tokens drawn by the policy that trains"),
        "logprob_gap/{kind}/tokens": Metric("such tokens"),
        "logprob_gap/{kind}/mean": Metric("the same by kind of prompt", "logprob_gap/{kind}/tokens"),
        "logprob_gap/{kind}/max": Metric("the largest"),
        "logprob_gap/{kind}/kl": Metric("KL divergence (k3 estimate), a token", "logprob_gap/{kind}/tokens"),
        "importance/mean": Metric("importance weight of all response tokens", "response_tokens"),
        "importance/max": Metric("the largest"),
        "importance/truncated_share": Metric("share of tokens whose weight is above the truncation", "response_tokens"),
        "importance/clamped_tokens": Metric(
            "tokens whose log-probs differ by more than 20 between trainer and rollout, and are taken to differ by that"
        ),
        "importance/effective_share": Metric("effective sample size as a share of the tokens", "response_tokens"),
        "correction/kept_tokens": Metric("tokens that the policy learned from under --correction"),
        "correction/rejected_tokens": Metric("tokens that --correction left out, and out of every mean"),
        "correction/vetoed_rollouts": Metric("answers left out whole (--correction-veto)"),
        "correction/truncated_share": Metric("share of tokens whose weight was held", "correction/kept_tokens"),
        "correction/mean_weight": Metric("mean weight of the tokens learned from", "correction/kept_tokens"),
        "correction/effective_share": Metric(
            "effective sample size of these weights as a share of the tokens", "correction/kept_tokens"
        ),
    },
    "Supervised fine-tuning": {
        "loss": Metric("negative log-likelihood of a label token, before the step's update", "label_tokens"),
        "label_tokens": Metric("tokens that were learned"),
        "tokens": Metric("tokens of all conversations, those of images included"),
        "samples": Metric("conversations of the step"),
        "images": Metric("images of the step"),
        "skipped_samples": Metric("conversations that could not be read at their step (--on-bad skip)"),
        "vision_cache/images": Metric("images that were looked for in --cache-vision since the last row"),
        "vision_cache/found": Metric("those of them that were there, and were not encoded"),
        "vision_cache/too_large": Metric("those whose features are too many for --cache-vision-gb, and are not kept"),
        "vision_cache/ranks_not_writing": Metric("ranks that gave up writing there, such as to a full disk"),
        "row_fill": Metric("share of the rows' room that tokens fill; null without packing"),
        "speed/tokens_per_second_per_gpu": Metric(
            "tokens a second and GPU, waiting for data included; only where the peak of the device is known"
        ),
        "speed/model_tflops_per_gpu": Metric("TFLOP/s of the model a GPU, counted from real lengths"),
        "speed/mfu": Metric("their share of the device's dense bf16 peak"),
        "held_out/loss": Metric("the same loss on the held-out part, after the step", "held_out/tokens"),
        "held_out/tokens": Metric("label tokens of the held-out rows that were asked"),
        "held_out/{source}/loss": Metric("the same of one source", "held_out/{source}/tokens"),
        "held_out/{source}/tokens": Metric("its label tokens"),
    },
    "A policy's experts, as means over its layers": {
        "experts/peak_load": Metric("tokens of the busiest expert over the mean of all; 1 is even"),
        "experts/entropy": Metric("evenness of the experts' load; 1 is even, 0 a single expert"),
        "experts/idle_share": Metric("share of the experts that no token chose"),
        "experts/balance_loss": Metric("load-balancing loss, without its coefficient; 1 is even"),
        "experts/z_loss": Metric("squared log-partition of a router's logits, without its coefficient"),
    },
    "What the discriminator's pass ran": {
        "discriminator/trunk_tokens": Metric("token slots that ran forward, padding and repetition included"),
        "discriminator/unique_tokens": Metric("tokens judged, each counted once, a prompt once for each tower"),
        "discriminator/pass_overhead": Metric(
            "passes over token slots (a backward one counts 2) over those that each token once would take"
        ),
        "discriminator/rollouts_per_reference": Metric("answers that share one reference's pass"),
        "discriminator/references_apart": Metric("1 where references had micro-batches of their own"),
    },
    "Against the known truth (the mini's scenes)": {
        "truth/responses": Metric("answers judged"),
        "truth/items": Metric("items that a caption names", "truth/responses"),
        "truth/item_accuracy": Metric("caption items that are right", "truth/responses"),
        "truth/caption_exact": Metric("captions with every item right", "truth/responses"),
        "truth/step_validity": Metric("reasoning steps that are right", "truth/responses"),
        "truth/reasoning_exact": Metric("reasoning with every step right", "truth/responses"),
        "truth/answer_right": Metric("final answers that are right", "truth/responses"),
    },
}
"""Under headings, in the order of the page. ``probe/NAME`` is NAME on the fixed set of --probe-every."""


class UnknownMetricError(KeyError):
    """A metric that the catalogue does not have."""


def describe(name: str) -> Metric:
    """The entry of a metric as it stands in a row, with ``counted_by`` spelled out alike.

    Raises UnknownMetricError. Example: ``describe("reasoning/auc").counted_by == "reasoning/auc_pairs"``.
    """
    prefix, bare = (_HELD_OUT, name.removeprefix(_HELD_OUT)) if name.startswith(_HELD_OUT) else ("", name)
    for entries in METRICS.values():
        for pattern, metric in entries.items():
            if (found := _regex(pattern).fullmatch(bare)) is not None:
                count = None if metric.counted_by is None else prefix + metric.counted_by.format(**found.groupdict())
                return Metric(metric.meaning, count)
    raise UnknownMetricError(f"{name!r} has no entry in observability/catalogue.py; give it one")


def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"{(\w+)}", pattern)
    texts, holes = parts[::2], parts[1::2]
    groups = [f"(?P<{hole}>{_STANDS_FOR[hole]})" for hole in holes]
    return re.compile("".join(re.escape(text) + group for text, group in zip(texts, [*groups, ""], strict=True)))


def page() -> str:
    """The Markdown of ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "What the rows of `metrics.jsonl` hold, one row a step. A figure without data is null beside a count of 0;",
        "the count in brackets also weights it wherever several steps are summed up. `{tower}` is `perception` or",
        "`reasoning`, `{role}` is `policy` or `discriminator`, `{kind}` is `text` or `image`. `probe/NAME` is NAME on",
        "the fixed set of `--probe-every`: what changes there is the discriminator alone. Which of them a row has",
        "depends on the stage.",
        "",
        "This page is written by `python -m prism_megatron.observability.catalogue`.",
    ]
    for heading, entries in METRICS.items():
        lines += ["", f"## {heading}", "| metric | meaning |", "|---|---|"]
        for name, metric in entries.items():
            count = "" if metric.counted_by is None else f" (`{metric.counted_by}`)"
            meaning = metric.meaning.replace("|", r"\|")
            lines.append(f"| `{name}`{count} | {meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
