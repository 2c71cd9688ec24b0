"""Published algorithms as presets: the constants of their papers, and those of PRISM's released scripts.

``None`` stands where a paper or script says nothing, and what a configuration has by itself stays. How the algorithms
differ is in ``docs/algorithms.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from prism_megatron.config.engine.optimizer import OptimizerConfig
from prism_megatron.config.stages.objective import PolicyObjective
from prism_megatron.errors import ConfigError

AlgorithmName = Literal[
    "grpo", "dapo", "gspo", "gspo-token", "sapo", "dr-grpo", "cispo", "gmpo", "dppo",
    "prism-grpo", "prism-dapo", "prism-gspo",
]  # fmt: skip
AdvantageForm = Literal["group", "group-mean", "gdpo"]
"""Reward less the group's mean over its standard deviation; less its mean only; per reward, then whitened."""


@dataclass(frozen=True)
class Overlong:
    """DAPO's soft punishment (2503.14476, eq. 13): 0 up to ``longest - buffer`` tokens, ``-factor`` at the end."""

    longest: int
    buffer: int
    factor: float = 1.0


@dataclass(frozen=True)
class Algorithm:
    """What ``--algo`` stands for: each value is a default that a flag or a line of YAML may replace."""

    objective: PolicyObjective
    source: str
    """where the constants are from, and which of them are ours"""
    advantage: AdvantageForm = "group"
    overlong: Overlong | None = None
    lr: float | None = None
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    dynamic_sampling: bool = False
    weight_decay: float | None = None

    def optimizer(self, base: OptimizerConfig) -> OptimizerConfig:
        """``base`` with the rate, warm-up and decay that the paper or script states."""
        stated = {name: getattr(self, name) for name in ("lr", "warmup_steps", "warmup_ratio", "weight_decay")}
        return replace(base, **{name: value for name, value in stated.items() if value is not None})


def _clipped(**constants: Any) -> PolicyObjective:
    return PolicyObjective(family="clipped", **constants)


ALGORITHMS: Mapping[AlgorithmName, Algorithm] = {
    "grpo": Algorithm(
        _clipped(aggregation="sequence-mean", kl="k3", kl_coefficient=0.04),
        "arXiv 2402.03300: KL 0.04, rate 1e-6, one update a batch; the clip of 0.2 is PPO's",
        lr=1e-6,
    ),
    "dapo": Algorithm(
        _clipped(clip_high=0.28, mini_batches=16),
        "arXiv 2503.14476: 16 updates a batch, 20 steps of warm-up, answers up to 20480 tokens",
        overlong=Overlong(longest=20480, buffer=4096),
        dynamic_sampling=True,
        lr=1e-6,
        warmup_steps=20,
    ),
    "gspo": Algorithm(
        PolicyObjective(family="gspo", clip_low=3e-4, clip_high=4e-4, aggregation="sequence-mean", mini_batches=4),
        "arXiv 2507.18071: 4 mini-batches",
    ),
    "gspo-token": Algorithm(
        PolicyObjective(
            family="gspo-token", clip_low=3e-4, clip_high=4e-4, aggregation="sequence-mean", mini_batches=4
        ),
        "arXiv 2507.18071, section 4.3: the constants of gspo",
    ),
    "sapo": Algorithm(
        PolicyObjective(family="sapo", aggregation="sequence-mean", mini_batches=4),
        "arXiv 2511.20347; the 4 mini-batches are those of gspo, which it is held against",
    ),
    "dr-grpo": Algorithm(
        _clipped(aggregation="budget", token_budget=8192),
        "arXiv 2503.20783; the budget is the longest answer of PRISM's scripts",
        advantage="group-mean",
    ),
    "cispo": Algorithm(
        PolicyObjective(family="cispo", clip_low=1.0, clip_high=0.2, mini_batches=16),
        "arXiv 2506.13585 publishes no upper bound: 0.2 is that of verl's example, and 16 updates are DAPO's",
    ),
    "gmpo": Algorithm(
        PolicyObjective(family="gmpo", clip_low=0.4, clip_high=0.4, aggregation="sequence-mean", mini_batches=4),
        "arXiv 2507.20673; the 4 mini-batches are ours",
    ),
    "dppo": Algorithm(
        PolicyObjective(family="dppo", mini_batches=4),
        "arXiv 2602.04879, Binary-TV, with verl's constants; the 4 mini-batches are ours",
    ),
    "prism-grpo": Algorithm(
        _clipped(dual_clip=3.0),
        "PRISM's script: one update a batch, so that no clip ever binds",
        lr=1e-6,
        weight_decay=0.01,
    ),
    "prism-dapo": Algorithm(
        _clipped(clip_high=0.28, dual_clip=10.0),
        "PRISM's script: one update a batch, so that no clip ever binds",
        overlong=Overlong(longest=8192, buffer=4096),
        dynamic_sampling=True,
        lr=1e-6,
        warmup_steps=10,
        weight_decay=0.1,
    ),
    "prism-gspo": Algorithm(
        PolicyObjective(family="gspo", clip_low=3e-4, clip_high=4e-4, aggregation="sequence-mean"),
        "PRISM's script: one update a batch, so that no clip ever binds",
        lr=1e-6,
        warmup_ratio=0.05,
        weight_decay=0.1,
    ),
}


def algorithm(name: str) -> Algorithm:
    """The preset of that name. Raises ConfigError for another one."""
    if name not in ALGORITHMS:
        raise ConfigError(f"there is no --algo {name}; choose one of {', '.join(get_args(AlgorithmName))}")
    return ALGORITHMS[name]  # type: ignore[index]  # it is one of the names
