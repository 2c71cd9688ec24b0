"""Faster ways of an expert layer beside the plain ones: the same numbers, and how long each takes.

Shape suffixes: L tokens, H hidden, Q sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model_providers.qwen3_vl.provider import Qwen3VLProvider
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.speed import SpeedConfig
from prism_megatron.config.presets import preset
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.host.fast_paths import PLAIN_PATHS, FastPaths, Setting, fast_paths
from prism_megatron.engine.layers.experts import ExpertLayer
from prism_megatron.errors import ConfigError
from prism_megatron.gpu_check.bench import Bench
from prism_megatron.gpu_check.rows import Row, measured, skipped, within
from prism_megatron.gpu_check.works import spread

PRESET = "30B-A3B"
APART = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Most that outputs and gradients may lie apart, relative to their norms: what the formats, and TF32, resolve."""


@dataclass(frozen=True)
class Way:
    """One of the faster ways, on layers of a library, in a dtype in which it is to give the plain numbers."""

    name: str
    library: str
    wish: SpeedConfig
    dtype: torch.dtype = torch.bfloat16


_OFF = SpeedConfig(fuse_weight_gradients="off", fuse_swiglu="off", fuse_permutation="off")
WAYS = (
    Way("SwiGLU compiled", "torch", dataclasses.replace(_OFF, fuse_swiglu="on")),
    Way("SwiGLU compiled", "te", dataclasses.replace(_OFF, fuse_swiglu="on")),
    Way("permutation fused", "te", dataclasses.replace(_OFF, fuse_permutation="on")),
    # In bf16 logits are often equal, and either expert may be taken.
    Way("choice of experts fused", "te", dataclasses.replace(_OFF, fuse_router=True), torch.float32),
)


def check_experts(bench: Bench) -> Iterator[Row]:
    """Every way whose kernels are there; the others are skipped by name."""
    tokens = bench.size(4096, 64)
    for way in WAYS:
        name = f"{PRESET} experts, layers of {way.library}, {way.name}"
        try:
            fast = settled(bench, way)
        except ConfigError as error:
            yield skipped(name, str(error))
            continue
        plain, other = (expert_pass(bench, way, one, tokens=tokens) for one in (PLAIN_PATHS, fast))
        yield within(f"{name}: apart", spread(other(), plain()), APART[way.dtype])
        seconds, plainly = bench.seconds(other), bench.seconds(plain)
        yield measured(f"{name}: {tokens} tokens", seconds * 1e3, "ms", f"{seconds / plainly:.2f} of the plain time")


def settled(bench: Bench, way: Way) -> FastPaths:
    """The way as a run would take it. Raises ConfigError where it cannot be had."""
    if way.library == "te" and not (bench.machine.transformer_engine and bench.machine.compute_capability):
        raise ConfigError("it needs Transformer Engine and a CUDA device")
    dtype = "bf16" if way.dtype == torch.bfloat16 else "fp32"
    setting = Setting("te" if way.library == "te" else "torch", ParallelConfig(), ranks=1, dtype=dtype)
    return fast_paths(bench.machine, way.wish, setting)[0]


def expert_pass(bench: Bench, way: Way, fast: FastPaths, *, tokens: int) -> Callable[[], tuple[Tensor, ...]]:
    """Output and gradients of the same layer, tokens and weights whatever the ``fast`` ways are."""
    published = preset(PRESET)
    text = dataclasses.replace(published.text, num_layers=1)
    if bench.dry:
        text = dataclasses.replace(text, num_experts=16, expert_ffn=32)
    shape = dataclasses.replace(published, text=text, vision=dataclasses.replace(published.vision, taps=()))
    provider = Qwen3VLProvider(shape, execution=Execution(layers="te" if way.library == "te" else "torch", fast=fast))
    config = provider.transformer_config(ParallelConfig(), way.dtype)
    chunk = provider.build_chunk(config, bench.world.groups, pre_process=False, post_process=False, vp_stage=None)
    layer = next(one for one in chunk.modules() if isinstance(one, ExpertLayer)).to(bench.device, way.dtype)
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(bench.device, way.dtype)

    with torch.no_grad():
        for _, parameter in sorted(layer.named_parameters()):
            parameter.copy_(drawn(*parameter.shape) * 0.02)
    hidden_L_1_H, gradient_L_1_H = drawn(tokens, 1, text.hidden).requires_grad_(), drawn(tokens, 1, text.hidden)
    sequence = torch.zeros(tokens, 1, dtype=torch.long, device=bench.device)
    lengths_Q = torch.tensor([tokens], device=bench.device)
    inputs = [hidden_L_1_H, *(parameter for _, parameter in sorted(layer.named_parameters()))]

    def run() -> tuple[Tensor, ...]:
        output, _ = layer(hidden_L_1_H, sequence, lengths_Q)
        return output.detach(), *torch.autograd.grad(output, inputs, gradient_L_1_H)

    return run
