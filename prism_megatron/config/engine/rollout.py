"""How the policy samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from prism_megatron.config.fields import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, ZERO_IS_OFF, OnResume, Range


@dataclass(frozen=True)
class RolloutConfig:
    """Size and sampling of one step's rollouts (paper: 4 prompts x 16, plain sampling)."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FREE

    prompts_per_step: Annotated[int, AT_LEAST_ONE, OnResume.FIXED] = 4
    """prompts in one alignment step, over all data-parallel ranks"""
    rollouts_per_prompt: Annotated[int, AT_LEAST_ONE, OnResume.FIXED] = 16
    """samples of one prompt; they form one group"""
    temperature: Annotated[float, POSITIVE, OnResume.FIXED] = 1.0
    """sampling temperature"""
    top_p: Annotated[float, Range(above=0, at_most=1), OnResume.FIXED] = 1.0
    """nucleus mass; 1 samples from the whole distribution"""
    logprob_gap_alarm: Annotated[float, POSITIVE] = 0.05
    """say so in every step whose rollout and trainer log-probs differ by more, on average a token, for either text or
    image prompts"""
    rollout: Annotated[Literal["embedded", "sglang"], OnResume.FIXED] = "embedded"
    """who samples: a replica of the policy on every rank, or SGLang servers"""
    rollout_ahead: Annotated[int, NOT_NEGATIVE, OnResume.FIXED] = 0
    """steps whose rollouts SGLang servers already draw while an earlier step trains, from a policy that many updates
    old at most; 0 draws each step's rollouts from the policy that trains on them"""
    rollout_servers: Annotated[int, AT_LEAST_ONE] = 1
    """SGLang servers to start on this host, each with a copy of the policy"""
    rollout_tp: Annotated[int, AT_LEAST_ONE] = 1
    """GPUs of this host, next to one another, that share each started server's copy; without CUDA, processes"""
    rollout_urls: tuple[str, ...] = ()
    """SGLang servers that run already, instead of starting some; PRISM_ROLLOUT_API_KEY holds their key"""
    rollout_router: str | None = None
    """an sglang-router over the servers of --rollout-urls, with the same key: it shares the requests out, while weights
    go to every server"""
    rollout_colocated: bool = False
    """servers use the trainer's GPUs, and release their memory while it trains; those of --rollout-urls must have been
    started with --enable-memory-saver"""
    rollout_memory_fraction: Annotated[float | None, Range(above=0, below=1)] = None
    """share of a GPU's memory for a started server's weights, keys and values; by default what SGLang takes"""
    rollout_sync: Literal["disk", "tensor", "group", "ipc"] = "disk"
    """how servers get weights: from the run's folder, which all of them must be able to read, over HTTP, through a
    process group (NCCL, or gloo without CUDA), or by handles of the trainer's GPU memory, on the same host alone"""
    rollout_bucket_mib: Annotated[int, AT_LEAST_ONE] = 256
    """a rank that hands weights over by --rollout-sync tensor, group or ipc takes at most two such buckets of memory
    beside the weights, in MiB, or two of the largest tensor; half a bucket travels at a time"""
    rollout_master_address: str | None = None
    """where the workers of servers reach every rank that sends weights, for --rollout-sync group; by default, for each
    rank and server, the address that the rank's host has on the way to the server"""
    rollout_spool_every: Annotated[int, AT_LEAST_ONE] = 1
    """of the versions that are handed over by --rollout-sync tensor, group or ipc, every how many-th is written to the
    run's folder, in the background; a server that is started again gets weights from there. With more than 1 it stays
    out until the next hand-over where the version in use was not written"""
    rollout_probe_every: Annotated[int, ZERO_IS_OFF] = 10
    """after every so many steps each server and the trainer score the same answer, and must agree; 0 never asks"""
    rollout_probe_bound: Annotated[float, POSITIVE] = 0.1
    """by how much the probe's log-probs may differ, on average a token"""
    rollout_timeout_minutes: Annotated[int, AT_LEAST_ONE] = 10
    """how long servers may take for one step's samples of a rank, restarts included, before the run ends"""
    rollout_start_minutes: Annotated[float, POSITIVE] = 20.0
    """how long a server that is started may take until it answers; a model of 235B parameters takes longest to load"""
    rollout_restarts_per_hour: Annotated[int, NOT_NEGATIVE] = 12
    """servers that die are started again, so often in any hour, all of them together; then the run ends"""
    rollout_python: Path = Path(".venv-sglang/bin/python")
    """interpreter that has sglang; make sglang sets this one up"""
    rollout_embedded_ranks: Annotated[int | None, AT_LEAST_ONE] = None
    """ranks that hold a replica of the policy and sample; by default all for weights below 1 GB, else one a node"""
