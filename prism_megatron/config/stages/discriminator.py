"""What the discriminator is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol

from prism_megatron.config.fields import AT_LEAST_ONE, NOT_NEGATIVE, OnResume, Range
from prism_megatron.errors import ConfigError

Routing = Literal["segment", "learned", "dense"]
Modality = Literal["multimodal", "text"]
LoadBalanceScope = Literal["sequence", "microbatch"]

SECTION = "prism_discriminator"
"""The section of a model folder's ``config.json`` that makes it a discriminator's, and says of which kind."""

SEGMENTS = ("perception", "reasoning")
"""What is judged; a batch's ``tower_ids`` are places in this."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """A Qwen3-VL whose MLPs are towers of experts, with a scalar head."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FIXED

    discriminator: str | None = None
    """a saved discriminator that reads the policy's tokens and images: run folder, checkpoint, model folder or hub id;
    without it the policy's weights are upcycled, if they are dense (mini world: its shipped one, if the flags ask for
    that kind)"""
    routing: Routing = "segment"
    """segment: one tower of experts for perception, one for reasoning, and a token goes to that of the segment being
    judged; learned: one pool for both, as the paper's authors released it; dense: the MLPs stay as they are"""
    modality: Modality = "multimodal"
    """text: the discriminator is not shown the images"""
    experts_per_tower: Annotated[int, AT_LEAST_ONE] = 4
    """experts in each of the two towers, or in the one pool of --routing learned"""
    top_k: int = 2
    """experts per token, picked inside the token's tower"""
    upcycle_noise: Annotated[float, NOT_NEGATIVE] = 0.01
    """standard deviation added to each expert's copy of the dense MLP"""
    router_std: Annotated[float, NOT_NEGATIVE] = 0.02
    """standard deviation of the fresh router and scalar head"""
    head_dropout: Annotated[float, Range(at_least=0, below=1)] = 0.1
    """dropout before the scalar head, in the loss only; scores are read without it"""
    load_balance: Annotated[float | None, NOT_NEGATIVE] = None
    """coefficient of the load-balancing loss per layer and tower; by default 0 in alignment, and in warm-start what the
    paper's 0.01 over all layers together comes to, 0.01 · top_k / layers"""
    load_balance_scope: LoadBalanceScope = "sequence"
    """whose tokens are to be balanced: each sequence's, which does not change when a batch or the world is split, or
    all of a micro-batch's (Switch)"""
    router_z_loss: Annotated[float, NOT_NEGATIVE] = 0.0
    """coefficient of the router's squared log-partition, which keeps its logits small (ST-MoE: 0.001)"""
    freeze_vision: bool = False
    """keep the discriminator's vision tower as loaded; --modality text always does"""


class KindFlags(Protocol):
    """The flags that say which kind of discriminator is meant."""

    @property
    def routing(self) -> Routing: ...
    @property
    def modality(self) -> Modality: ...
    @property
    def experts_per_tower(self) -> int: ...
    @property
    def top_k(self) -> int: ...


def check_kind(flags: KindFlags) -> None:
    """Raise ConfigError for experts that cannot be, or that ``--routing dense`` would ignore."""
    default = DiscriminatorConfig()
    if flags.routing == "dense":
        for name in ("experts_per_tower", "top_k"):
            if getattr(flags, name) != getattr(default, name):
                flag = f"--{name.replace('_', '-')} {getattr(flags, name)}"
                raise ConfigError(f"--routing dense has no experts; leave {flag} out")
    if not 1 <= flags.top_k <= flags.experts_per_tower:
        raise ConfigError(
            f"--top-k {flags.top_k} must lie between 1 and --experts-per-tower {flags.experts_per_tower}: "
            "a token's experts are picked inside its tower"
        )


def check_upcycling(config: DiscriminatorConfig) -> None:
    """Raise ConfigError for flags of a fresh discriminator where none is made, or where it has no experts."""
    default = DiscriminatorConfig()
    if config.discriminator is not None:
        for name in ("upcycle_noise", "router_std"):
            if getattr(config, name) != getattr(default, name):
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} is for a discriminator made anew; leave {flag} or --discriminator out")
    elif config.routing == "dense" and config.upcycle_noise != default.upcycle_noise:
        raise ConfigError("--upcycle-noise is for experts, and --routing dense has none; leave it out")


def check_router_losses(config: DiscriminatorConfig, *, load_balance: float) -> None:
    """Raise ConfigError for a router's loss that nothing could learn from; ``load_balance`` is the stage's own."""
    if config.routing == "dense":
        for flag, value in (("--load-balance", load_balance), ("--router-z-loss", config.router_z_loss)):
            if value:
                raise ConfigError(f"{flag} {value:g} is for routers, and --routing dense has none; leave it out")
        if config.load_balance_scope != DiscriminatorConfig().load_balance_scope:
            raise ConfigError("--load-balance-scope is for routers, and --routing dense has none; leave it out")
    elif load_balance and config.top_k == config.experts_per_tower:
        raise ConfigError(
            f"--load-balance {load_balance:g} has nothing to balance where every token goes to all "
            f"{config.top_k} experts of its tower: the loss is constant; use --load-balance 0, a smaller --top-k or "
            "more --experts-per-tower"
        )
