"""Which of Megatron's faster ways a run takes, settled once from what was asked for, the machine and the layout.

Each way is a line of the table of capabilities. None changes what is trained; ``docs/fast_paths.md`` says of each how
exact it is and how that was tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.speed import Dispatcher, SpeedConfig, Wish
from prism_megatron.config.engine.transformer_engine import FUSED_ROUTER, is_at_least
from prism_megatron.engine.host.capabilities import Choice, Installed
from prism_megatron.errors import ConfigError


@dataclass(frozen=True)
class FastPaths:
    """The ways that are taken; by default the plain ones."""

    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    bucket_parameters: int | None = None
    fuse_weight_gradients: bool = False
    fuse_swiglu: bool = False
    fuse_permutation: bool = False
    fuse_router: bool = False
    dispatcher: Dispatcher = "alltoall"

    def settings(self, *, experts: bool) -> dict[str, Any]:
        """What Megatron's ``TransformerConfig`` calls those of layers, which have ``experts`` or not."""
        settings: dict[str, Any] = {
            "gradient_accumulation_fusion": self.fuse_weight_gradients,
            # 0.16 refuses its default, "allgather", beside variable lengths, experts or not.
            "moe_token_dispatcher_type": "alltoall",
        }
        if experts:
            settings |= {
                "bias_activation_fusion": self.fuse_swiglu,  # read by our experts (engine/layers/expert_mlps.py)
                "moe_permute_fusion": self.fuse_permutation,
                "moe_router_fusion": self.fuse_router,
            }
        if experts and self.dispatcher == "deepep":
            settings |= {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
        return settings


PLAIN_PATHS = FastPaths()


@dataclass(frozen=True)
class Setting:
    """What ways depend on beside the machine."""

    layers: Literal["te", "torch"]
    """whose modules decoder layers are"""
    parallel: ParallelConfig
    ranks: int
    """over which gradients are summed, those of experts included"""
    dtype: str
    """``bf16`` or ``fp32``"""


@dataclass(frozen=True)
class _Way:
    """A way that can be taken or left."""

    part: str
    flag: str
    wish: Wish
    yes: str
    no: str
    lacks: Sequence[str] = ()
    """what it needs and is not there"""
    idle: str = ""
    """why ``auto`` leaves it although it could be had"""

    @property
    def is_taken(self) -> bool:
        """Raises ConfigError for a way that is asked for and cannot be had."""
        if self.wish == "on" and self.lacks:
            raise ConfigError(f"{self.flag} cannot be had here: {' and '.join(self.lacks)}; leave it out")
        return self.wish == "on" or (self.wish == "auto" and not self.lacks and not self.idle)

    @property
    def choice(self) -> Choice:
        """Its line of the table."""
        taken = self.is_taken
        why = "" if taken or self.wish == "off" else f": {' and '.join(self.lacks) or self.idle}"
        return Choice(self.part, self.yes if taken else self.no, f"{self.flag} {self.wish}{why}")


def fast_paths(machine: Installed, speed: SpeedConfig, setting: Setting) -> tuple[FastPaths, tuple[Choice, ...]]:
    """The ways that a run takes, and their lines of the table. Raises ConfigError for one that cannot be had."""
    cuda = machine.compute_capability is not None
    sums = _Way(
        "gradient sums", "--overlap-grad-reduce", speed.overlap_grad_reduce, "during backward", "after the pass",
        idle="no CUDA device that could compute meanwhile" if not cuda else _alone(setting),
    )  # fmt: skip
    gathers = _Way(
        "weight gathers", "--overlap-param-gather", speed.overlap_param_gather, "during forward", "after the update",
        lacks=[
            *([] if sums.is_taken else ["gradient sums do not overlap"]),
            *([] if setting.parallel.distributed_optimizer else ["--no-distributed-optimizer gathers nothing"]),
        ],
    )  # fmt: skip
    weights, swiglu = _weight_gradients(machine, speed, setting.layers), _swiglu(machine, speed)
    no_te = [] if setting.layers == "te" else ["layers are not Transformer Engine's"]
    permutation = _Way(
        "order of experts' tokens", "--fuse-permutation", speed.fuse_permutation,
        f"Transformer Engine {machine.transformer_engine}, fused", "torch, by index", lacks=no_te,
    )  # fmt: skip
    router = _Way(
        "choice of experts", "--fuse-router", "on" if speed.fuse_router else "off",
        f"Transformer Engine {machine.transformer_engine}, fused", "torch", lacks=[*no_te, *_old_router(machine)],
    )  # fmt: skip
    paths = FastPaths(
        overlap_grad_reduce=sums.is_taken,
        overlap_param_gather=gathers.is_taken,
        bucket_parameters=speed.bucket_parameters if sums.is_taken else None,
        fuse_weight_gradients=weights.is_taken,
        fuse_swiglu=swiglu.is_taken,
        fuse_permutation=permutation.is_taken,
        fuse_router=router.is_taken,
        dispatcher=_dispatcher(machine, speed.moe_dispatcher, setting),
    )
    carrier = "DeepEP" if paths.dispatcher == "deepep" else "all-to-all"
    ways = (sums, gathers, weights, swiglu, permutation, router)
    return paths, (
        *(way.choice for way in ways),
        Choice("carriage of experts' tokens", carrier, f"--moe-dispatcher {paths.dispatcher}"),
        Choice("CUDA graphs", "off", "shapes differ from micro-batch to micro-batch"),
    )


def _alone(setting: Setting) -> str:
    return "gradients are those of one rank" if setting.ranks == 1 else ""


def _weight_gradients(machine: Installed, speed: SpeedConfig, layers: Literal["te", "torch"]) -> _Way:
    """Transformer Engine's layers do it by themselves, Megatron's over torch by apex's kernel, or by torch on CPUs."""
    lacks = []
    if machine.compute_capability and layers == "torch" and not machine.fused_weight_gradients:
        lacks.append("NVIDIA apex's extension fused_weight_gradient_mlp_cuda (built with --cuda_ext) is missing")
    return _Way(
        "weight gradients", "--fuse-weight-gradients", speed.fuse_weight_gradients,
        "summed in the product", "summed after the product", lacks=lacks,
    )  # fmt: skip


def _swiglu(machine: Installed, speed: SpeedConfig) -> _Way:
    return _Way(
        "experts' SwiGLU and gates", "--fuse-swiglu", speed.fuse_swiglu,
        "one kernel, compiled by torch", "torch, one function",
        lacks=[] if machine.compiler is None else [machine.compiler],
        idle="" if machine.compute_capability else "compiling for a CPU takes longer than it gains",
    )  # fmt: skip


def _old_router(machine: Installed) -> list[str]:
    if machine.transformer_engine is None or is_at_least(machine.transformer_engine, FUSED_ROUTER):
        return []
    return [f"it needs Transformer Engine {FUSED_ROUTER} and {machine.transformer_engine} is here"]


def _dispatcher(machine: Installed, wanted: Dispatcher, setting: Setting) -> Dispatcher:
    if wanted == "alltoall":
        return wanted
    parallel = setting.parallel
    lacks = [
        why
        for fits, why in (
            (machine.compute_capability is not None, "there is no CUDA device"),
            (machine.deep_ep, "the package deep_ep is missing"),
            (setting.dtype == "bf16", f"its kernels take bf16, and the model is in {setting.dtype}"),
            (not parallel.deterministic, "nobody says in which order its kernels add, as --deterministic asks for"),
            (parallel.ep * parallel.expert_tp > 1, "at --ep 1, with experts uncut, no token leaves its rank"),
        )
        if not fits
    ]
    if lacks:
        raise ConfigError(f"--moe-dispatcher deepep cannot be had here: {' and '.join(lacks)}; leave it out")
    return wanted
