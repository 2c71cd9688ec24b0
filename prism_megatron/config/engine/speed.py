"""Megatron's ways of taking many optimizer steps faster. None of them changes what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.fields import AT_LEAST_ONE, OnResume
from prism_megatron.errors import ConfigError

Wish = Literal["auto", "on", "off"]
"""auto takes a way where it can be had and helps; on raises an error where it cannot"""
Dispatcher = Literal["alltoall", "deepep"]


@dataclass(frozen=True)
class SpeedConfig:
    """What runs beside what, and what is computed in one kernel, for every role that trains."""

    ON_RESUME: ClassVar[OnResume] = OnResume.FREE

    overlap_grad_reduce: Wish = "auto"
    """sum gradients over data-parallel ranks bucket by bucket, while the backward pass goes on; auto does so on CUDA"""
    overlap_param_gather: Wish = "auto"
    """gather updated weights bucket by bucket, while the next forward pass goes on; needs --overlap-grad-reduce and
    --distributed-optimizer, and auto does so beside both"""
    bucket_parameters: Annotated[int | None, AT_LEAST_ONE] = None
    """weights of such a bucket; by default Megatron's, 40 million or a million a data-parallel rank"""
    fuse_weight_gradients: Wish = "auto"
    """add weight gradients to their sum inside the matrix product, in float32; on CUDA it needs layers of Transformer
    Engine or NVIDIA apex's extension"""
    fuse_swiglu: Wish = "auto"
    """compile what lies between the products of an expert, SwiGLU times the gate, into one kernel; auto does so on CUDA
    with Triton"""
    fuse_permutation: Wish = "auto"
    """order tokens by their experts, and back, with kernels of Transformer Engine, where its layers are used"""
    fuse_router: bool = False
    """choose experts with Transformer Engine's kernel, where its layers are used; which of two experts with equal
    logits it takes is not said, so it is never chosen by itself"""
    moe_dispatcher: Dispatcher = "alltoall"
    """who carries tokens to experts of other ranks: NCCL's all-to-all, or DeepEP's kernels, which need CUDA, bf16 and
    the package deep_ep"""


def check_speed(speed: SpeedConfig, *, distributed_optimizer: bool) -> None:
    """Raise ConfigError for flags that do not go together."""
    overlaps = speed.overlap_grad_reduce == "on"
    if speed.overlap_param_gather == "on" and not (overlaps and distributed_optimizer):
        raise ConfigError(
            "--overlap-param-gather on gathers by the buckets of --overlap-grad-reduce on what --distributed-optimizer "
            "has split; add them, or leave it out"
        )
    if speed.bucket_parameters is not None and speed.overlap_grad_reduce == "off":
        raise ConfigError("--bucket-parameters is for --overlap-grad-reduce, which is off; leave one of them out")


def check_speed_of_experts(speed: SpeedConfig, layouts: Sequence[ParallelConfig]) -> None:
    """Raise ConfigError for what only experts could use; ``layouts`` are those of the run's models that have some."""
    asked = {
        "--fuse-swiglu on": speed.fuse_swiglu == "on",
        "--fuse-permutation on": speed.fuse_permutation == "on",
        "--fuse-router": speed.fuse_router,
        "--moe-dispatcher deepep": speed.moe_dispatcher == "deepep",
    }
    for flag, is_set in asked.items():
        if is_set and not layouts:
            raise ConfigError(f"{flag} is for models with experts, and none that trains has any; leave it out")
    if speed.moe_dispatcher == "deepep" and any(layout.ep * layout.expert_tp == 1 for layout in layouts):
        raise ConfigError(
            "--moe-dispatcher deepep carries tokens between ranks, and a model of this run has its experts whole on "
            "every rank (--ep 1, or --discriminator-ep 1); split them, or leave it out"
        )
