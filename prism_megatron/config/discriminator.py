"""What the discriminator is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DiscriminatorConfig:
    """A Qwen3-VL whose MLPs are two towers of experts (perception, reasoning), with a scalar head."""

    discriminator: str | None = None
    """folder of a saved discriminator, or a checkpoint with one; without it the policy's weights are upcycled (mini
    world: its shipped one)"""
    experts_per_tower: int = 4
    """experts in each of the two towers"""
    top_k: int = 2
    """experts per token, picked inside the token's tower"""
    upcycle_noise: float = 0.01
    """standard deviation added to each expert's copy of the dense MLP"""
    router_std: float = 0.02
    """standard deviation of the fresh router and scalar head"""
    head_dropout: float = 0.1
    """dropout before the scalar head, in the loss only; scores are read without it"""
    load_balance: float | None = None
    """coefficient of the load-balancing loss per layer and tower; by default 0 in alignment, and in warm-start what the
    paper's 0.01 over all layers together comes to, 0.01 · top_k / layers"""
    freeze_vision: bool = False
    """keep the discriminator's vision tower as loaded"""
