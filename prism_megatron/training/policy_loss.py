"""The policy's loss of one micro-batch: which surrogate an objective has, its mean, and the figures beside it.

Shape suffixes: B rows, L tokens of this context-parallel rank, n labelled tokens that are looked at together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.engine.batch import Batch, Extra, beside_logits, label_places, sequences_beside_logits
from prism_megatron.engine.logprobs import Chosen, VocabularyOutput
from prism_megatron.engine.provider import LossOutput
from prism_megatron.engine.runtime import World
from prism_megatron.engine.token_values import sum_over_context
from prism_megatron.losses.importance import importance_weights
from prism_megatron.losses.logprob_gap import logprob_gap
from prism_megatron.losses.policy.aggregate import aggregate, denominator_of
from prism_megatron.losses.policy.clipped import clipped, policy_gradient
from prism_megatron.losses.policy.kl import kl_estimate
from prism_megatron.losses.policy.rows import Rows
from prism_megatron.losses.policy.sequence import gmpo, gspo, gspo_token
from prism_megatron.losses.policy.soft import sapo
from prism_megatron.losses.policy.surrogate import Surrogate
from prism_megatron.losses.policy.weighted import cispo, dppo
from prism_megatron.losses.reduction import masked_sum
from prism_megatron.training.experience import Experience


@dataclass(frozen=True)
class Denominators:
    """What sums of one update are divided by, counted over all ranks and micro-batches."""

    loss: float
    """of the objective: kept tokens, answers, or a budget"""
    tokens: float
    """response tokens, those that are left out included: of figures"""


def denominators_of(experience: Experience, objective: PolicyObjective) -> Denominators:
    """Those of an update on all rows of ``experience``, which every rank has."""
    loss = denominator_of(
        objective.aggregation,
        tokens=experience.kept_tokens,
        rows=experience.kept_rows,
        budget=objective.token_budget,
    )
    return Denominators(loss, float(experience.response_tokens))


def surrogate_of(
    objective: PolicyObjective,
    logprobs_n: Tensor,
    old_logprobs_n: Tensor | None,
    advantages_n: Tensor,
    rows: Rows,
) -> Surrogate:
    """The surrogate of the objective's family, with its constants."""
    given = logprobs_n, old_logprobs_n, advantages_n
    low, high = objective.clip_low, objective.clip_high
    match objective.family:
        case "policy-gradient":
            return policy_gradient(logprobs_n, advantages_n)
        case "clipped":
            return clipped(*given, clip_low=low, clip_high=high, dual_clip=objective.dual_clip)
        case "gspo":
            return gspo(*given, rows, clip_low=low, clip_high=high)
        case "gspo-token":
            return gspo_token(*given, rows, clip_low=low, clip_high=high)
        case "gmpo":
            return gmpo(*given, rows, clip_low=low, clip_high=high)
        case "sapo":
            return sapo(*given, positive=objective.soft_positive, negative=objective.soft_negative)
        case "cispo":
            return cispo(*given, clip_low=low, clip_high=high)
        case "dppo":
            return dppo(*given, bound=objective.divergence_bound, cap=objective.ratio_cap)


@dataclass(frozen=True, eq=False)
class Tokens:
    """What is known of tokens beside the policy's log-probs; None where there is none."""

    advantages_n: Tensor
    rows: Rows
    old_logprobs_n: Tensor | None = None
    reference_logprobs_n: Tensor | None = None
    weights_n: Tensor | None = None
    """importance weights"""


@dataclass(frozen=True, eq=False)
class TokensLoss:
    """Some tokens' share of an update's loss, and detached figures: sums add up, of maxima the largest counts."""

    loss: Tensor
    sums: Mapping[str, Tensor]
    maxima: Mapping[str, Tensor]


def tokens_loss(
    objective: PolicyObjective, logprobs_n: Tensor, entropy_n: Tensor, tokens: Tokens, *, denominator: float
) -> TokensLoss:
    """``-mean(weight * surrogate) + kl_coefficient * mean(kl) - entropy_coefficient * mean(entropy)``.

    Means are over the whole update, of which this is a share. Raises ValueError where a divergence is asked for and
    there are no log-probs of a reference.
    """
    rows, old_n = tokens.rows, tokens.old_logprobs_n
    share = partial(aggregate, rows=rows, kind=objective.aggregation, denominator=denominator)
    sums: dict[str, Tensor] = {}
    maxima: dict[str, Tensor] = {}
    surrogate = surrogate_of(objective, logprobs_n, old_n, tokens.advantages_n, rows)
    objective_n = surrogate.objective_n
    loss = -share(objective_n if tokens.weights_n is None else objective_n * tokens.weights_n)
    if objective.kl != "none":
        if tokens.reference_logprobs_n is None:
            raise ValueError(f"the divergence {objective.kl} needs log-probs of a reference policy for every row")
        kl_n = kl_estimate(logprobs_n, tokens.reference_logprobs_n, estimator=objective.kl)
        loss = loss + objective.kl_coefficient * share(kl_n)
        sums["kl/reference"] = masked_sum(kl_n.detach(), rows.kept_n)
    if objective.entropy_coefficient:
        loss = loss - objective.entropy_coefficient * share(entropy_n)
    if objective.ratio != "none":
        sums |= _ratio_sums(surrogate, logprobs_n, old_n, rows.kept_n)
        kept_n = surrogate.ratio_n.masked_fill(~rows.kept_n, 0.0)
        maxima["ratio/max"] = torch.cat([kept_n, kept_n.new_zeros(1)]).max()
    return TokensLoss(loss, sums, maxima)


def policy_loss(
    output: VocabularyOutput,
    batch: Batch,
    *,
    world: World,
    objective: PolicyObjective,
    denominators: Denominators,
    temperature: float,
) -> LossOutput:
    """The objective's loss under the sampling temperature, and how far rollout and trainer log-probs are apart.

    The gap is that of tokens from the policy being trained, where it must vanish; importance weights are those of all.
    Both are of the policy before the first update where that is known. Raises ValueError as ``tokens_loss``.
    """
    beside = partial(beside_logits, batch=batch, world=world)
    mask_B_L, advantages_B_L = beside(batch.extras[Extra.LABEL_MASK]), beside(batch.extras[Extra.ADVANTAGES])
    old_B_L, reference_B_L, weights_B_L = (
        beside(batch.extras[name]) if name in batch.extras else None
        for name in (Extra.OLD_LOGPROBS, Extra.REFERENCE_LOGPROBS, Extra.CORRECTION)
    )
    kept_B_L = mask_B_L if weights_B_L is None else mask_B_L * (weights_B_L > 0)
    row_B_L = sequences_beside_logits(batch, world)
    # Names of figures are the same on every rank, even where no token is.
    nothing = mask_B_L.new_zeros(())
    sums = dict.fromkeys(_names(objective), nothing)
    maxima = {} if objective.ratio == "none" else {"ratio/max": nothing}

    def token_loss(logprobs_n: Tensor, entropy_n: Tensor, of: Chosen) -> Tensor:
        def chosen(values_B_L: Tensor | None) -> Tensor | None:
            return None if values_B_L is None else of(values_B_L)

        rows = Rows(of(row_B_L), of(kept_B_L).bool(), batch.extras[Extra.KEPT_TOKENS], sum_over_context(world))
        tokens = Tokens(of(advantages_B_L), rows, chosen(old_B_L), chosen(reference_B_L), chosen(weights_B_L))
        share = tokens_loss(objective, logprobs_n, entropy_n, tokens, denominator=denominators.loss)
        sums.update({name: sums[name] + value for name, value in share.sums.items()})
        maxima.update({name: torch.maximum(maxima[name], value) for name, value in share.maxima.items()})
        return share.loss

    loss, (logprobs_B_L, entropy_B_L) = output.learn(
        token_loss,
        beside(batch.input_ids_B_S),
        label_places(batch, world),
        temperature=temperature,
        at_once=objective.ratio == "sequence",
    )
    sums |= {"policy_loss": loss.detach(), "entropy": entropy_B_L.sum() / denominators.tokens}
    mismatch = _mismatch(logprobs_B_L if old_B_L is None else old_B_L, batch, mask_B_L, world)
    return LossOutput(loss=loss, sums=sums | mismatch[0], maxima=maxima | mismatch[1])


_RATIO_SUMS = ("ratio/sum", "ratio/kl", "clip/low", "clip/high", "clip/dual")


def _names(objective: PolicyObjective) -> list[str]:
    return [*(_RATIO_SUMS if objective.ratio != "none" else ()), *(["kl/reference"] if objective.kl != "none" else [])]


def _ratio_sums(surrogate: Surrogate, logprobs_n: Tensor, old_n: Tensor | None, kept_n: Tensor) -> dict[str, Tensor]:
    """Over kept tokens; ``ratio/kl`` is the k3 estimate of KL(before ‖ now) from tokens drawn before."""
    now_n = logprobs_n.detach()
    before_n = now_n if old_n is None else old_n
    values = (
        surrogate.ratio_n,
        kl_estimate(before_n, now_n, estimator="k3"),
        surrogate.low_n.float(),
        surrogate.high_n.float(),
        surrogate.dual_n.float(),
    )
    return {name: masked_sum(value_n, kept_n) for name, value_n in zip(_RATIO_SUMS, values, strict=True)}


def _mismatch(
    policy_logprobs_B_L: Tensor, batch: Batch, mask_B_L: Tensor, world: World
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums and maxima of importance weights and of the gap between rollout and trainer."""
    beside = partial(beside_logits, batch=batch, world=world)
    rollout_logprobs_B_L = beside(batch.extras[Extra.ROLLOUT_LOGPROBS])
    weights = importance_weights(policy_logprobs_B_L, rollout_logprobs_B_L, mask_B_L)
    sums = {"importance/tokens": weights.tokens, "importance/sum": weights.total,
            "importance/squares": weights.squares, "importance/truncated": weights.truncated,
            "importance/clamped": weights.clamped}  # fmt: skip
    maxima = {"importance/max": weights.largest}
    image_B_L, on_policy_B_L = (beside(batch.extras[name]) for name in (Extra.IMAGE_MASK, Extra.ON_POLICY_MASK))
    for kind, kind_mask_B_L in (("text", mask_B_L - image_B_L), ("image", image_B_L)):
        gap = logprob_gap(policy_logprobs_B_L, rollout_logprobs_B_L, kind_mask_B_L * on_policy_B_L)
        sums |= {f"gap/{kind}/tokens": gap.tokens, f"gap/{kind}/sum": gap.absolute, f"gap/{kind}/kl": gap.kl}
        maxima[f"gap/{kind}/max"] = gap.largest
    return sums, maxima
