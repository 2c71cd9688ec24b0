"""The sizes of a model's expert layers, and the layouts they can be cut into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.fields import NOT_NEGATIVE, OnResume
from prism_megatron.errors import ConfigError, listed


@dataclass(frozen=True)
class ExpertSizes:
    """``count`` experts in every layer, each an MLP ``width`` wide; ``per_token`` of them see a token.

    Example: Qwen3-VL-30B-A3B has 128 experts, 768 wide, 8 per token.
    """

    count: int
    per_token: int
    width: int

    def check_layout(self, parallel: ParallelConfig) -> None:
        """Raise ConfigError, naming the values that would do, for a layout the experts cannot be cut into."""
        if parallel.tp > 1 and not parallel.sequence_parallel(experts=True):
            raise ConfigError(
                f"--sp {parallel.sp} cannot work at --tp {parallel.tp}: expert layers need sequence parallelism "
                "there; use --sp auto or on"
            )
        if self.count % parallel.ep:
            raise ConfigError(
                f"--ep {parallel.ep} does not divide the {self.count} experts of a layer; "
                f"use --ep {listed(divisors(self.count))}"
            )
        if self.width % parallel.expert_tp:
            flag = f"--tp {parallel.tp} without --etp" if parallel.etp is None else f"--etp {parallel.etp}"
            raise ConfigError(
                f"{flag} cuts every expert over {parallel.expert_tp} ranks, which does not divide its width of "
                f"{self.width}; use --etp {listed(divisors(self.width))}"
            )


@dataclass(frozen=True)
class RouterLosses:
    """Coefficients of what every router of a policy adds to the loss; 0 adds nothing."""

    balance: float = 0.0
    z: float = 0.0

    def __bool__(self) -> bool:
        return self.balance > 0 or self.z > 0


NO_ROUTER_LOSSES = RouterLosses()


@dataclass(frozen=True)
class PolicyExpertsConfig:
    """What a policy with experts learns beside its own loss."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    moe_aux_loss_coeff: Annotated[float, NOT_NEGATIVE] = 0.0
    """coefficient of each layer's load-balancing loss, a mean over the step's conversations, weighed by their tokens;
    1 is balanced (Qwen3's own config states 0.001)"""
    moe_z_loss_coeff: Annotated[float, NOT_NEGATIVE] = 0.0
    """coefficient of each router's squared log-partition, a mean over the step's tokens (ST-MoE: 0.001)"""

    @property
    def losses(self) -> RouterLosses:
        return RouterLosses(self.moe_aux_loss_coeff, self.moe_z_loss_coeff)


def check_policy_experts(config: PolicyExpertsConfig, experts: ExpertSizes | None, *, frozen: bool) -> None:
    """Raise ConfigError for a router's loss that nothing could learn from; ``frozen`` says whether routers are."""
    for flag, value in (
        ("--moe-aux-loss-coeff", config.moe_aux_loss_coeff),
        ("--moe-z-loss-coeff", config.moe_z_loss_coeff),
    ):
        if not value:
            continue
        if experts is None:
            raise ConfigError(f"{flag} {value:g} is for models with experts, and --model has none; leave it out")
        if frozen:
            raise ConfigError(f"{flag} {value:g} is for routers that learn; leave it or --freeze router out")
    if experts is not None and config.moe_aux_loss_coeff and experts.per_token == experts.count:
        raise ConfigError(
            f"--moe-aux-loss-coeff {config.moe_aux_loss_coeff:g} has nothing to balance where every token goes to all "
            f"{experts.count} experts: the loss is constant; leave it out"
        )


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
