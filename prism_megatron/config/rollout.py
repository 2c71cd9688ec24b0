"""How the policy samples."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RolloutConfig:
    """Size and sampling of one step's rollouts (paper: 4 prompts x 16, plain sampling)."""

    prompts_per_step: int = 4
    """prompts in one alignment step, over all data-parallel ranks"""
    rollouts_per_prompt: int = 16
    """samples of one prompt; they form one group"""
    temperature: float = 1.0
    """sampling temperature"""
    top_p: float = 1.0
    """nucleus mass; 1 samples from the whole distribution"""
    logprob_gap_alarm: float = 0.05
    """say so in every step whose rollout and trainer log-probs differ by more, on average a token, for either text or
    image prompts"""
    rollout_embedded_ranks: int | None = None
    """ranks that hold a replica of the policy and sample; by default all for weights below 1 GB, else one a node"""
