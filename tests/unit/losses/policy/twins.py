"""Twins of every objective: loops over Python's floats, with derivatives written by hand. Slow, and read beside papers.

A row is one answer. ``jacobian[t][u]`` is what the objective of token t gains by the log-prob of token u.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from prism_megatron.config.stages.objective import PolicyObjective


@dataclass(frozen=True)
class Row:
    """Log-probs of one answer's tokens now, before, and of a reference; advantages; weights, 0 where left out."""

    logprobs: list[float]
    old: list[float]
    advantages: list[float]
    weights: list[float]
    reference: list[float]

    @property
    def kept(self) -> list[int]:
        return [t for t, weight in enumerate(self.weights) if weight > 0]


@dataclass
class Found:
    """A loss, its gradient by row and token, and sums over kept tokens."""

    loss: float = 0.0
    gradient: list[list[float]] = field(default_factory=list)
    low: int = 0
    high: int = 0
    dual: int = 0
    ratio_sum: float = 0.0
    ratio_max: float = 0.0
    kl_sum: float = 0.0


def share_of(objective: PolicyObjective, rows: Sequence[Row], row: Row) -> float:
    """What one token of ``row`` counts in the mean over ``rows``."""
    tokens, answers = sum(len(one.kept) for one in rows), sum(bool(one.kept) for one in rows)
    return {
        "token-mean": 1 / tokens if tokens else 0.0,
        "sequence-mean": 1 / (answers * len(row.kept)) if row.kept else 0.0,
        "sequence-sum": 1 / answers if answers else 0.0,
        "budget": 1 / (answers * objective.token_budget) if answers and objective.token_budget else 0.0,
    }[objective.aggregation]


def twin(objective: PolicyObjective, rows: Sequence[Row]) -> Found:
    """The loss of all rows together."""
    found = Found()
    for row in rows:
        gradient = [0.0] * len(row.logprobs)
        share = share_of(objective, rows, row)
        values, jacobian = _surrogate(objective, row, found)
        for t, value in values.items():
            found.loss -= share * row.weights[t] * value
            for u, derivative in jacobian[t].items():
                gradient[u] -= share * row.weights[t] * derivative
            if objective.kl != "none":
                kl, slope = _kl(objective.kl, row.logprobs[t] - row.reference[t])
                found.loss += objective.kl_coefficient * share * kl
                gradient[t] += objective.kl_coefficient * share * slope
                found.kl_sum += kl
        found.gradient.append(gradient)
    return found


def _kl(estimator: str, d: float) -> tuple[float, float]:
    if estimator == "k1":
        return d, 1.0
    if estimator == "k2":
        return d * d / 2, d
    return math.exp(-d) + d - 1, 1 - math.exp(-d)


def _surrogate(
    objective: PolicyObjective, row: Row, found: Found
) -> tuple[dict[int, float], dict[int, dict[int, float]]]:
    """Value and derivatives of each kept token; counts go into ``found``."""
    kept = row.kept
    if not kept:
        return {}, {}
    family, low, high = objective.family, objective.clip_low, objective.clip_high
    log = {t: row.logprobs[t] - row.old[t] for t in kept}
    mean = sum(log.values()) / len(kept)
    values: dict[int, float] = {}
    jacobian: dict[int, dict[int, float]] = {}
    held = {t: _held(log[t], row.advantages[t], low, high) for t in kept}
    for t in kept:
        a, r, lp = row.advantages[t], math.exp(log[t]), row.logprobs[t]
        derivatives = {}
        if family == "policy-gradient":
            value, derivatives, r = a, {t: a}, 1.0
        elif family == "clipped":
            value, moves = _clipped(r, a, objective, found, dual=objective.dual_clip)
            derivatives = {t: r * a if moves else 0.0}
        elif family in {"gspo", "gspo-token"}:
            r = math.exp(mean)
            value, moves = _clipped(r, a, objective, found, dual=0.0)
            if family == "gspo":
                derivatives = {u: r * a / len(kept) if moves else 0.0 for u in kept}
            else:
                derivatives = {t: r * a if moves else 0.0}
        elif family == "gmpo":
            r = math.exp(sum(c for c, _ in held.values()) / len(kept))
            value = r * a
            derivatives = {u: r * a / len(kept) if held[u][1] else 0.0 for u in kept}
            found.low += a < 0 and log[t] < -low
            found.high += a > 0 and log[t] > high
        elif family == "sapo":
            tau = objective.soft_positive if a > 0 else objective.soft_negative
            sigmoid = 1 / (1 + math.exp(-tau * (r - 1)))
            value, derivatives = 4 / tau * sigmoid * a, {t: 4 * sigmoid * (1 - sigmoid) * r * a}
        elif family == "cispo":
            weight = min(max(r, 1 - low), 1 + high)
            value, derivatives = weight * a * lp, {t: weight * a}
            found.low += r < 1 - low
            found.high += r > 1 + high
        else:
            moved = math.exp(lp) - math.exp(row.old[t])
            over = a > 0 and moved > objective.divergence_bound
            under = a <= 0 and moved < -objective.divergence_bound
            weight = 0.0 if over or under else min(r, objective.ratio_cap)
            value, derivatives = weight * a * lp, {t: weight * a}
            found.low += under
            found.high += over
        values[t], jacobian[t] = value, derivatives
        found.ratio_sum += r
        found.ratio_max = max(found.ratio_max, r)
    return values, jacobian


def _clipped(r: float, a: float, objective: PolicyObjective, found: Found, *, dual: float) -> tuple[float, bool]:
    """min(r A, clip(r) A), bounded by c A where A < 0; and whether it still moves with r."""
    low, high = 1 - objective.clip_low, 1 + objective.clip_high
    if a > 0 and r > high:
        found.high += 1
        return high * a, False
    if a < 0 and r < low:
        found.low += 1
        return low * a, False
    if a < 0 and dual and r > dual:
        found.dual += 1
        return dual * a, False
    return r * a, True


def _held(log: float, a: float, low: float, high: float) -> tuple[float, bool]:
    """GMPO's clipped log-ratio, and whether it still moves."""
    if a > 0:
        return (high, False) if log > high else (log, True)
    if a < 0:
        return (-low, False) if log < -low else (log, True)
    return 0.0, False
