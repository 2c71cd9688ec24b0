"""What those who sample hold on a GPU: weights, keys and values, beside what the trainer keeps meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.forecast.before_start import whole_policy
from prism_megatron.forecast.plays import Case

BF16 = 2
SERVER_MARGIN = 3 * 2**30
"""Assumed: activations, CUDA graphs and workspaces of a server. SGLang keeps an eighth of a GPU free by default."""


@dataclass(frozen=True)
class Serving:
    """One GPU while answers are drawn."""

    kind: str
    """embedded, colocated servers, or servers apart"""
    engines: int
    """replicas or servers of the whole run"""
    gpus: int
    """of each"""
    resting: int
    """bytes that the trainer holds there meanwhile"""
    weights: int
    handover: int
    """buffers that a hand-over takes beside them"""
    margin: int
    a_token: int
    """bytes of keys and values"""
    longest: int
    """tokens of the longest prompt and answer"""

    def sequences(self, room: float) -> int:
        """Of the longest there are, how many one engine holds at once in so many bytes of each GPU."""
        left = room - self.resting - self.weights - self.handover - self.margin
        return max(0, int(left // (self.a_token * self.longest)))


def serving_of(rollout: RolloutConfig, case: Case, *, resting: int, longest: int) -> Serving:
    """Who samples for this policy; ``resting`` is what the trainer keeps on the neediest rank meanwhile."""
    served = rollout.rollout == "sglang"
    gpus = rollout.rollout_tp if served else 1
    hosts = -(-case.world_size // 8)
    whole = whole_policy(case)
    if served:
        engines = max(1, len(rollout.rollout_urls) or rollout.rollout_servers * hosts)
    else:
        engines = rollout.rollout_embedded_ranks or (case.world_size if whole < 10**9 else hosts)
    apart = served and not rollout.rollout_colocated
    kind = "servers apart" if apart else "colocated servers" if served else "embedded"
    return Serving(
        kind=kind,
        engines=engines,
        gpus=gpus,
        resting=0 if apart else resting,
        weights=whole // gpus,
        handover=_handover(rollout, case.shape),
        margin=SERVER_MARGIN if served else 0,
        a_token=cache_of_a_token(case.shape, gpus),
        longest=longest,
    )


def cache_of_a_token(shape: Qwen3VLShape, gpus: int) -> int:
    """Bytes of keys and values on one of ``gpus``; heads that are fewer than these are copied."""
    text = shape.text
    return 2 * text.num_layers * max(1, text.kv_heads // gpus) * text.head_dim * BF16


def _handover(rollout: RolloutConfig, shape: Qwen3VLShape) -> int:
    """Two buckets, or two of the largest tensor (the embedding) in the hand-over's format."""
    text = shape.text
    largest = text.vocab * text.hidden * BF16
    if text.experts is not None:
        largest = max(largest, text.experts.count * 2 * text.experts.width * text.hidden * BF16)
    bucket = 0 if rollout.rollout_sync == "disk" else rollout.rollout_bucket_mib * 2**20
    return 2 * max(bucket, largest)
