"""How many experts a layer has and which tower each belongs to. No torch, no Megatron."""

from __future__ import annotations

from dataclasses import dataclass

from prism_megatron.config.engine.experts import ExpertSizes
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class Towers:
    """Expert e belongs to tower ``e % num_towers``, so expert-parallel ranks hold equal shares of every tower.

    Example: two towers of four experts; perception (0) has experts 0, 2, 4, 6 and reasoning (1) has 1, 3, 5, 7.
    With ``num_towers = 1`` all sequences share one pool, whatever segment they judge.
    """

    num_towers: int = 2
    experts_per_tower: int = 4
    top_k: int = 2

    def __post_init__(self) -> None:
        if self.num_towers < 1 or self.experts_per_tower < 1:
            raise ConfigError(f"towers need at least one expert each, got {self}; raise --experts-per-tower")
        if not 1 <= self.top_k <= self.experts_per_tower:
            raise ConfigError(
                f"--top-k {self.top_k} must lie between 1 and --experts-per-tower {self.experts_per_tower}: "
                "a token's experts are picked inside its tower"
            )

    @property
    def num_experts(self) -> int:
        """Experts of one layer over all towers."""
        return self.num_towers * self.experts_per_tower

    def experts(self, width: int) -> ExpertSizes:
        """Sizes of a layer's experts, each ``width`` wide inside."""
        return ExpertSizes(self.num_experts, per_token=self.top_k, width=width)

    def check_expert_parallel(self, ep: int) -> None:
        """Raise ConfigError unless every expert-parallel rank holds an equal share of every tower."""
        if self.experts_per_tower % ep:
            fitting = [size for size in range(1, self.experts_per_tower + 1) if self.experts_per_tower % size == 0]
            raise ConfigError(
                f"--ep {ep} does not divide the {self.experts_per_tower} experts of a tower; use --ep "
                f"{', '.join(map(str, fitting))} or change --experts-per-tower"
            )
