"""The sizes of a model's expert layers, and the layouts they can be cut into."""

from __future__ import annotations

from dataclasses import dataclass

from prism_megatron.config.parallel import ParallelConfig
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


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
