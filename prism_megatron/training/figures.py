"""Entries of a step's row that several stages have: of an update, and of rollouts beside the trainer."""

from __future__ import annotations

from collections.abc import Mapping

from prism_megatron.engine.provider import StepResult
from prism_megatron.evaluation.health import Figures
from prism_megatron.observability.catalogue import PROMPT_KINDS

NOT_FINITE = "its gradient is not finite, so the update was dropped; lower the learning rate"
"""Why a role did not learn in a step."""


def ratio(total: float, count: float) -> float | None:
    """``total / count``, or None where there is nothing to divide."""
    return total / count if count else None


def update_row(role: str, result: StepResult | None) -> Figures:
    """How a role's update went; nulls where it had none."""
    return {
        f"{role}_grad_norm": None if result is None else result.grad_norm,
        f"{role}_lr": None if result is None else result.lr,
        f"{role}_updated": None if result is None else int(result.updated),
    }


def gap_row(sums: Mapping[str, float]) -> Figures:
    """|Rollout - trainer| log-prob a token drawn by the policy that trains: mean, then by kind of prompt."""
    tokens = {kind: sums[f"gap/{kind}/tokens"] for kind in PROMPT_KINDS}
    row: Figures = {"logprob_gap": ratio(sum(sums[f"gap/{kind}/sum"] for kind in PROMPT_KINDS), sum(tokens.values()))}
    for kind, count in tokens.items():
        row[f"logprob_gap/{kind}/tokens"] = int(count)
        row[f"logprob_gap/{kind}/mean"] = ratio(sums[f"gap/{kind}/sum"], count)
        row[f"logprob_gap/{kind}/max"] = sums[f"gap/{kind}/max"] if count else None
        row[f"logprob_gap/{kind}/kl"] = ratio(sums[f"gap/{kind}/kl"], count)
    return row


def importance_row(sums: Mapping[str, float]) -> Figures:
    """Importance weights of the step's tokens; all 1 but for rounding where the policy that trains drew them.

    ``effective_share`` is the effective sample size as a share of the tokens: (sum w)² / (tokens · sum w²).
    """
    tokens, total = sums["importance/tokens"], sums["importance/sum"]
    return {
        "importance/mean": ratio(total, tokens),
        "importance/max": sums["importance/max"] if tokens else None,
        "importance/truncated_share": ratio(sums["importance/truncated"], tokens),
        "importance/clamped_tokens": int(sums["importance/clamped"]),
        "importance/effective_share": ratio(total**2, tokens * sums["importance/squares"]),
    }


def correction_row(sums: Mapping[str, float]) -> Figures:
    """What --correction did to the step's tokens; nothing where it is off, or the policy was only measured."""
    if "correction/kept_tokens" not in sums:
        return {}
    kept = int(sums["correction/kept_tokens"])
    return {
        "correction/kept_tokens": kept,
        "correction/rejected_tokens": int(sums["correction/rejected_tokens"]),
        "correction/vetoed_rollouts": int(sums["correction/vetoed_rollouts"]),
        "correction/truncated_share": ratio(sums["correction/truncated_tokens"], kept),
        "correction/mean_weight": ratio(sums["correction/weight_sum"], kept),
        "correction/effective_share": sums.get("correction/effective_share"),
    }


def gap_alarms(row: Figures, threshold: float) -> list[str]:
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
