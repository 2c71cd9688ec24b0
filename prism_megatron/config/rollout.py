"""How the policy samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


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
    rollout: Literal["embedded", "sglang"] = "embedded"
    """who samples: a replica of the policy on every rank, or SGLang servers"""
    rollout_ahead: int = 0
    """steps whose rollouts SGLang servers already draw while an earlier step trains, from a policy that many updates
    old at most; 0 draws each step's rollouts from the policy that trains on them"""
    rollout_servers: int = 1
    """SGLang servers to start on this host, each with a copy of the policy"""
    rollout_urls: tuple[str, ...] = ()
    """SGLang servers that run already, instead of starting some; PRISM_ROLLOUT_API_KEY holds their key"""
    rollout_sync: Literal["disk", "tensor"] = "disk"
    """how servers get weights: from the run's folder, which all of them must be able to read, or over HTTP"""
    rollout_bucket_mib: int = 256
    """most weights in one HTTP call of --rollout-sync tensor, in MiB; a larger tensor travels alone"""
    rollout_python: Path = Path(".venv-sglang/bin/python")
    """interpreter that has sglang; make sglang sets this one up"""
    rollout_embedded_ranks: int | None = None
    """ranks that hold a replica of the policy and sample; by default all for weights below 1 GB, else one a node"""
