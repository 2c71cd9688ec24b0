"""What a policy maximises, given rollouts and what each of their tokens is worth: every constant by its name.

The formulas stand in ``prism_megatron/losses/policy``, and are compared in ``docs/algorithms.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.fields import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, ZERO_IS_OFF, OnResume, Range
from prism_megatron.errors import ConfigError

Family = Literal["policy-gradient", "clipped", "gspo", "gspo-token", "gmpo", "sapo", "cispo", "dppo"]
Aggregation = Literal["token-mean", "sequence-mean", "sequence-sum", "budget"]
KLEstimator = Literal["none", "k1", "k2", "k3"]
CorrectionKind = Literal[
    "none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask", "geometric-truncate", "geometric-mask"
]

_USED_BY: dict[str, frozenset[str]] = {
    "clip_low": frozenset({"clipped", "gspo", "gspo-token", "gmpo", "cispo"}),
    "clip_high": frozenset({"clipped", "gspo", "gspo-token", "gmpo", "cispo"}),
    "dual_clip": frozenset({"clipped"}),
    "soft_positive": frozenset({"sapo"}),
    "soft_negative": frozenset({"sapo"}),
    "divergence_bound": frozenset({"dppo"}),
    "ratio_cap": frozenset({"dppo"}),
}
"""Families that read a constant; the others have no use for it."""

DEFAULT_CORRECTION_BOUND = {"token": 2.0, "sequence": 2.0, "geometric": 1.001}
"""Upper bound of an importance weight by what it is a weight of: verl's defaults and the middle of its ranges."""


@dataclass(frozen=True)
class CorrectionConfig:
    """Importance weights for tokens that another policy drew than the one that trains on them.

    The ratio of a token is exp(trainer's log-prob before the update - rollout's log-prob). Example:
    ``CorrectionConfig("token-truncate")`` multiplies a token's loss by its ratio, or by 2 where that is less.
    """

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    correction: CorrectionKind = "none"
    """weigh what is learned from a token by how much likelier the trainer makes it than the rollout engine did: token
    by token, by the product over its answer (sequence), or by the mean of its answer (geometric). truncate: no weight
    is above --correction-high; mask: what lies outside the bounds is left out, and out of every mean. It costs one more
    forward pass"""
    correction_low: Annotated[float | None, POSITIVE] = None
    """lower bound of a mask; by default 1 / --correction-high"""
    correction_high: Annotated[float | None, POSITIVE] = None
    """upper bound of a weight; by default 2, and 1.001 for geometric"""
    correction_veto: Annotated[float | None, Range(above=0, below=1)] = None
    """leave out an answer with any token whose ratio is below this, such as 1e-4; by default none is"""

    @property
    def level(self) -> str:
        """What a ratio is made of: token, sequence or geometric."""
        return self.correction.split("-")[0]

    @property
    def masks(self) -> bool:
        return self.correction.endswith("mask")

    @property
    def high(self) -> float:
        return DEFAULT_CORRECTION_BOUND[self.level] if self.correction_high is None else self.correction_high

    @property
    def low(self) -> float:
        return 1.0 / self.high if self.correction_low is None else self.correction_low


def check_correction(config: CorrectionConfig, *, top_p: float) -> None:
    """Raise ConfigError for flags that nothing would use, and for rollouts from a part of the distribution only."""
    names = ("correction_low", "correction_high", "correction_veto")
    if config.correction == "none":
        for name in names:
            if getattr(config, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} needs --correction; name a kind, such as token-truncate, or leave it out")
        return
    if config.correction_low is not None and not config.masks:
        raise ConfigError(
            f"--correction-low is for a mask, and --correction {config.correction} has an upper bound only; leave it "
            f"out, or use --correction {config.level}-mask"
        )
    if config.masks and config.low > config.high:
        raise ConfigError(
            f"--correction-low {config.low:g} is above --correction-high {config.high:g}, so that every token would be "
            "left out; give a smaller one"
        )
    if top_p < 1.0:
        raise ConfigError(
            f"--correction {config.correction} compares log-probs of the whole distribution, and --top-p {top_p:g} "
            "samples from a part of it; use --top-p 1, or leave --correction out"
        )


def recommended_correction(config: CorrectionConfig, rollout: RolloutConfig) -> str | None:
    """What to say at the start where rollouts are not those of the policy that trains, and nothing corrects that."""
    if config.correction != "none" or rollout.rollout == "embedded":
        return None
    ahead = rollout.rollout_ahead
    which = f"are up to {ahead} updates old (--rollout-ahead {ahead})" if ahead else "come from servers"
    needs = "" if rollout.top_p == 1 else " with --top-p 1"
    return f"rollouts {which} and nothing corrects for that; --correction token-truncate{needs} would, off as released"


@dataclass(frozen=True)
class PolicyObjective:
    """What is maximised. The default is the plain policy gradient as a mean over all response tokens.

    Example: ``PolicyObjective(family="clipped", clip_high=0.28, mini_batches=4)``; those of published algorithms are in
    ``config/stages/algorithms.py``.
    """

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    family: Family = "policy-gradient"
    """how a token's probability ratio to the policy before the update enters, and what bounds it"""
    clip_low: Annotated[float, POSITIVE] = 0.2
    """how far below 1 a ratio may count (for gmpo, below 0 a log-ratio); 1 and more bound nothing, but for gmpo"""
    clip_high: Annotated[float, POSITIVE] = 0.2
    """how far above 1 a ratio may count (for gmpo, above 0 a log-ratio)"""
    dual_clip: Annotated[float, ZERO_IS_OFF] = 0.0
    """where an advantage is negative, the objective is at least so many times the advantage"""
    soft_positive: Annotated[float, POSITIVE] = 1.0
    """steepness of sapo's gate for positive advantages"""
    soft_negative: Annotated[float, POSITIVE] = 1.05
    """steepness of sapo's gate for other advantages"""
    divergence_bound: Annotated[float, Range(above=0, below=1)] = 0.15
    """how far dppo lets a sampled token's probability move in the direction of its advantage"""
    ratio_cap: Annotated[float, POSITIVE] = 20.0
    """largest ratio that dppo weighs a token by"""
    aggregation: Aggregation = "token-mean"
    """token-mean: over all tokens; sequence-mean: over tokens of an answer, then over answers; sequence-sum: sum over
    an answer's tokens, mean over answers; budget: that mean divided by --token-budget"""
    token_budget: Annotated[int, ZERO_IS_OFF] = 0
    """tokens that --aggregation budget divides an answer's sum by, such as the longest answer that is allowed"""
    kl: KLEstimator = "none"
    """estimator of the divergence from a frozen reference policy that is added to the loss"""
    kl_coefficient: Annotated[float, NOT_NEGATIVE] = 0.0
    """its weight"""
    entropy_coefficient: Annotated[float, NOT_NEGATIVE] = 0.0
    """weight of the policy's entropy in the objective; 0 for none"""
    mini_batches: Annotated[int, AT_LEAST_ONE] = 1
    """updates that a batch of rollouts is divided into"""
    epochs: Annotated[int, AT_LEAST_ONE] = 1
    """times that a batch of rollouts is learned from"""
    correction: tyro.conf.OmitArgPrefixes[CorrectionConfig] = field(default_factory=CorrectionConfig)

    @property
    def ratio(self) -> Literal["none", "token", "sequence"]:
        """What one probability ratio belongs to; a sequence's needs the log-probs of all its tokens."""
        if self.family == "policy-gradient":
            return "none"
        return "sequence" if self.family in {"gspo", "gspo-token", "gmpo"} else "token"

    @property
    def updates(self) -> int:
        """Updates of the policy in one step."""
        return self.mini_batches * self.epochs

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the log-probs before the first update must be known; else they are those of the update itself."""
        return self.updates > 1 or self.correction.correction != "none"


def check_objective(objective: PolicyObjective, *, like: PolicyObjective, top_p: float) -> None:
    """Raise ConfigError for constants that contradict one another, or that nothing reads.

    ``like`` is what the objective was made from, such as an algorithm's preset: a constant that its family has no use
    for must be as it is there.
    """
    for name, users in _USED_BY.items():
        if objective.family not in users and getattr(objective, name) != getattr(like, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} is for {', '.join(sorted(users))}, and the family is {objective.family}; "
                "leave it out"
            )
    if (objective.aggregation == "budget") != (objective.token_budget > 0):
        raise ConfigError(
            "--token-budget and --aggregation budget need each other; give both, such as the longest answer, or neither"
        )
    if (objective.kl == "none") != (objective.kl_coefficient == 0):
        raise ConfigError("--kl and --kl-coefficient need each other; give both or neither")
    if objective.family == "clipped" and 0 < objective.dual_clip < 1 + objective.clip_high:
        raise ConfigError(
            f"--dual-clip {objective.dual_clip:g} must be at least 1 + --clip-high, {1 + objective.clip_high:g}, or 0, "
            "which turns it off"
        )
    if objective.family == "policy-gradient" and objective.updates > 1:
        raise ConfigError(
            f"--mini-batches {objective.mini_batches} times --epochs {objective.epochs} are {objective.updates} "
            "updates from the same rollouts, and policy-gradient corrects none of them; use one, or another --family"
        )
    check_correction(objective.correction, top_p=top_p)
