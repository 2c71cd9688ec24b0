"""Which implementation each part of a model uses on this machine, and why.

megatron-core falls back silently where a library is missing, and ignores ``fp8`` without Transformer Engine. Here the
choice is made once, from what is installed and what was asked for; it is printed at the start of a run and handed to
the layer specs, and what Megatron chooses by itself (Adam) is compared with it.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from prism_megatron.config.engine.precision import Fp8Recipe, PrecisionConfig
from prism_megatron.config.engine.transformer_engine import why_unfit
from prism_megatron.errors import ConfigError

Library = Literal["te", "apex", "torch"]

MINIMUM_CAPABILITY: dict[Fp8Recipe, tuple[int, int]] = {
    "delayed": (8, 9),
    "tensorwise": (8, 9),
    "blockwise": (9, 0),
    "mxfp8": (10, 0),
}
"""CUDA compute capability that an FP8 recipe needs (Transformer Engine 2.20, ``pytorch/quantization.py``)."""

_ADAM_MODULES: dict[str, Library] = {"transformer_engine": "te", "apex": "apex", "torch": "torch"}


@dataclass(frozen=True)
class Installed:
    """What a machine has. Versions are None for what is absent or does not load."""

    torch: str
    compute_capability: tuple[int, int] | None = None
    """of the CUDA device; None where there is none"""
    transformer_engine: str | None = None
    apex: bool = False
    """NVIDIA's; the PyPI package of that name is another one"""
    flash_attn: str | None = None
    fused_weight_gradients: bool = False
    """NVIDIA apex's CUDA extension of that name, which megatron-core's linear layers use"""
    deep_ep: bool = False
    compiler: str | None = None
    """why torch cannot compile kernels for the device; None where it can"""


@dataclass(frozen=True)
class Choice:
    """What one part of a model uses: a line of the table."""

    part: str
    uses: str
    why: str


@dataclass(frozen=True)
class Capabilities:
    """The choices of a run. ``layers`` are the modules decoder layers are built of, experts and attention included."""

    layers: Literal["te", "torch"]
    adam: Library
    choices: tuple[Choice, ...]

    def lines(self) -> list[str]:
        """The table as text."""
        widths = [max(len(getattr(choice, name)) for choice in self.choices) for name in ("part", "uses")]
        return [f"{c.part:<{widths[0]}}  {c.uses:<{widths[1]}}  {c.why}" for c in self.choices]


def installed() -> Installed:
    """Look at this machine. Imports Megatron's door to Transformer Engine, for only what it can load counts."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return Installed(
        torch=torch.__version__,
        compute_capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        transformer_engine=_version("transformer-engine") if HAVE_TE else None,
        apex=_has("apex.optimizers", "FusedAdam"),
        flash_attn=_version("flash-attn") if _has("flash_attn", "flash_attn_func") else None,
        fused_weight_gradients=_has("fused_weight_gradient_mlp_cuda", "wgrad_gemm_accum_fp32"),
        deep_ep=_has("deep_ep", "Buffer"),
        compiler=_lacking_compiler(),
    )


def choose(machine: Installed, precision: PrecisionConfig) -> Capabilities:
    """The implementations of a run with ``precision`` on ``machine``.

    Raises ConfigError where Transformer Engine or FP8 are asked for and cannot be had.
    """
    cuda = machine.compute_capability is not None
    missing = [*_lacking_te(machine.transformer_engine), *([] if cuda else ["there is no CUDA device"])]
    wanted = precision.transformer_engine
    if missing and (wanted == "on" or precision.fp8 != "none"):
        flag = f"--fp8 {precision.fp8}" if precision.fp8 != "none" else "--transformer-engine on"
        raise ConfigError(
            f"{flag} needs Transformer Engine and a CUDA device: {' and '.join(missing)}; "
            "use --fp8 none --transformer-engine auto, or run where both are"
        )
    _check_fp8_device(machine, precision)
    layers: Literal["te", "torch"] = "te" if not missing and wanted != "off" else "torch"
    adam: Library = "te" if machine.transformer_engine else "apex" if machine.apex else "torch"
    why = f"torch {machine.torch}: " + ("--transformer-engine off" if wanted == "off" else "; ".join(missing))
    in_te = f"Transformer Engine {machine.transformer_engine}"
    rows = _te_rows(machine, precision, in_te) if layers == "te" else _torch_rows(why)
    head = Choice("output layer", "torch matmul", "logits in fp32" if precision.fp32_head else "logits in the dtype")
    return Capabilities(layers=layers, adam=adam, choices=(*rows, head, _adam_row(machine, adam, in_te)))


def check_adam(capabilities: Capabilities, optimizers: Iterable[Any]) -> None:
    """Raise RuntimeError where Megatron built another Adam than the table says."""
    for optimizer in optimizers:
        package = type(optimizer).__module__.split(".")[0]
        if _ADAM_MODULES.get(package) != capabilities.adam:
            raise RuntimeError(
                f"megatron-core built {type(optimizer).__module__}.{type(optimizer).__qualname__} where the table of "
                f"capabilities says {capabilities.adam!r}; correct engine/host/capabilities.py"
            )


def _lacking_te(found: str | None) -> list[str]:
    if found is None:
        return ["Transformer Engine is not installed, or megatron-core cannot load it"]
    problem = why_unfit(found)
    return [] if problem is None else [problem]


def _check_fp8_device(machine: Installed, precision: PrecisionConfig) -> None:
    if precision.fp8 == "none" or machine.compute_capability is None:
        return
    needed = MINIMUM_CAPABILITY[precision.fp8_recipe]
    if machine.compute_capability < needed:
        fitting = [recipe for recipe, least in MINIMUM_CAPABILITY.items() if machine.compute_capability >= least]
        raise ConfigError(
            f"--fp8-recipe {precision.fp8_recipe} needs compute capability {_dotted(needed)}, this device has "
            f"{_dotted(machine.compute_capability)}; use "
            + (f"--fp8-recipe {' or '.join(fitting)}" if fitting else "--fp8 none")
        )


def _te_rows(machine: Installed, precision: PrecisionConfig, in_te: str) -> list[Choice]:
    flash = f"flash-attn {machine.flash_attn}" if machine.flash_attn else "no flash-attn, so not that"
    if precision.fp8 == "none":
        fp8 = Choice("fp8", "off", "--fp8 none")
    else:
        fp8 = Choice("fp8", f"{precision.fp8}, {precision.fp8_recipe} scales", "decoder layers only")
    return [
        Choice("linear layers", in_te, "decoder layers; torch in the vision tower and the output layer"),
        Choice("norms", f"{in_te}, fused", "decoder layers; torch in the vision tower and at the end"),
        Choice("core attention", in_te, f"it picks a kernel for each shape: its cuDNN ones or {flash}"),
        Choice("experts", f"{in_te}, grouped GEMM", "all experts of a rank in one call"),
        fp8,
    ]


def _torch_rows(why: str) -> list[Choice]:
    return [
        Choice("linear layers", "torch matmul in megatron-core's layers", why),
        Choice("norms", "torch, not fused", why),
        Choice("core attention", "torch scaled_dot_product_attention", "with torch's own flash kernels"),
        Choice("experts", "torch, one expert after another", why),
        Choice("fp8", "off", "--fp8 none"),
    ]


def _adam_row(machine: Installed, adam: Library, in_te: str) -> Choice:
    if adam == "te":
        return Choice("Adam", f"{in_te} FusedAdam", "megatron-core's first choice")
    if adam == "apex":
        return Choice("Adam", "NVIDIA apex FusedAdam", "Transformer Engine is missing")
    return Choice("Adam", "torch AdamW", f"torch {machine.torch}: Transformer Engine and NVIDIA apex are missing")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _has(module: str, name: str) -> bool:
    """Whether a module that may be another package's namesake has what we would use of it."""
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def _lacking_compiler() -> str | None:
    """torch compiles for CUDA with Triton, which needs a C compiler, and for the CPU with a C++ compiler."""
    if torch.cuda.is_available():
        if not _has("triton", "compile"):
            return "Triton is missing"
        names = (os.environ.get("CC"), "gcc", "clang")
    else:
        names = (os.environ.get("CXX"), "g++", "clang++")
    if any(shutil.which(name) for name in names if name):
        return None
    return f"there is no compiler ({', '.join(name for name in names if name)}) for torch"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
