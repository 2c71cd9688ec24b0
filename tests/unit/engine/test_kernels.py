"""Hand-written backward passes against autograd through the plain formulas, in float64."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from prism_megatron.engine.layers.attention import rotate
from prism_megatron.engine.layers.mlp import swiglu
from prism_megatron.engine.layers.norms import LayerNorm, RMSNorm

EPS = 1e-6


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def norm_of(size: int, dtype: torch.dtype) -> RMSNorm:
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=False, use_cpu_initialization=True)
    norm = RMSNorm(config, size, EPS)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(size, generator=torch.Generator().manual_seed(0)))
    return norm


def test_norm_equals_autograd_through_the_formula() -> None:
    """Claim: values and both gradients within 1e-12 in float64, where only summation order differs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    norm = norm_of(16, torch.float64)
    gradient = torch.randn(5, 3, 16, dtype=torch.float64, generator=generator)
    expected = plain_norm(x, norm.weight)
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(norm(x), (x, norm.weight), gradient),
        torch.autograd.grad(expected, (x, norm.weight), gradient),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_norm_in_bf16_casts_back_before_the_weight() -> None:
    """Claim: the formula as transformers orders it, but for rare elements whose square sums round differently (1 %);
    gradients within two bf16 roundings (2^-7)."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
    norm = norm_of(32, torch.bfloat16)
    wide = x.float()
    scaled = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).bfloat16()
    differing = (norm(x) != norm.weight * scaled).float().mean()
    assert float(differing) < 0.01, "a different order of roundings would change far more"
    gradient = torch.ones_like(x)
    ours, theirs = (torch.autograd.grad(y, x, gradient)[0] for y in (norm(x), plain_norm(wide, norm.weight.float())))
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=2**-7)


def test_layer_norm_is_torchs() -> None:
    """Claim: with an epsilon that shows, to 1e-12 in float64 (torch's own differentiates it)."""
    config = SimpleNamespace(params_dtype=torch.float64, sequence_parallel=False, use_cpu_initialization=True)
    norm = LayerNorm(config, 16, 0.3)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(5, 16, dtype=torch.float64)
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 0.3).sqrt()
    torch.testing.assert_close(norm(x), expected * norm.weight + norm.bias, rtol=0, atol=1e-12)


def test_rotation_equals_autograd_through_the_formula() -> None:
    """Claim: exact up to 1e-12 in float64; angles differ between the tokens and rows and repeat over the halves."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 2, 4, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    half = torch.randn(5, 2, 1, 4, dtype=torch.float64, generator=generator)
    angles = torch.cat((half, half), dim=-1)
    gradient = torch.randn(5, 2, 4, 8, dtype=torch.float64, generator=generator)
    ours, theirs = (turn(x, angles.cos(), angles.sin()) for turn in (rotate, plain_rotate))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours, x, gradient), torch.autograd.grad(theirs, x, gradient), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_swiglu_equals_autograd_through_the_formula() -> None:
    """Claim: exact up to 1e-12 in float64."""
    generator = torch.Generator().manual_seed(4)
    gate_up = torch.randn(6, 2, 10, dtype=torch.float64, generator=generator, requires_grad=True)
    gradient = torch.randn(6, 2, 5, dtype=torch.float64, generator=generator)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(swiglu(gate_up), expected, rtol=0, atol=1e-12)
    ours, theirs = (torch.autograd.grad(y, gate_up, gradient)[0] for y in (swiglu(gate_up), expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_rotation_and_swiglu_in_bf16_stay_within_their_roundings() -> None:
    """Claim: against the float32 formulas on the same bf16 inputs, two roundings of values up to 4 (2^-6) at most."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(16, 2, 4, 8, generator=generator).clamp(-2, 2).bfloat16()
    half = torch.randn(16, 2, 1, 4, generator=generator)
    cos, sin = (torch.cat((table, table), dim=-1).bfloat16() for table in (half.cos(), half.sin()))
    turned = plain_rotate(x.float(), cos.float(), sin.float())
    torch.testing.assert_close(rotate(x, cos, sin).float(), turned, rtol=0, atol=2**-6)
    gate, up = x.float().chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x).float(), gate * torch.sigmoid(gate) * up, rtol=0, atol=2**-5)
