"""Hand-written backward passes against autograd through the plain formulas, in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from prism_megatron.engine.host.capabilities import installed
from prism_megatron.engine.layers.attention import rotate
from prism_megatron.engine.layers.norms import LayerNorm, RMSNorm
from prism_megatron.engine.layers.swiglu import swiglu, weighted_swiglu

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


def unfused(gate_up: Tensor, gates: Tensor) -> Tensor:
    """As Megatron's experts write it without fusion (``MLP.forward``, ``TEGroupedMLP.forward``)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up * gates.unsqueeze(-1)).to(gate_up.dtype)


def weighted_case(dtype: torch.dtype, gates_dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input, gates and the result's gradient."""
    generator = torch.Generator().manual_seed(6)
    gate_up = torch.randn(tokens, 34, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    gates = torch.rand(tokens, dtype=torch.float64, generator=generator).to(gates_dtype).requires_grad_()
    return gate_up, gates, torch.randn(tokens, 17, dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize("tokens", [6, 1, 0])
def test_weighted_swiglu_equals_autograd_through_the_formula(tokens: int) -> None:
    """Claim: values, and gradients of both inputs, within 1e-12 in float64; one without tokens too."""
    gate_up, gates, gradient = weighted_case(torch.float64, torch.float64, tokens)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = gate * torch.sigmoid(gate) * up * gates.unsqueeze(-1)
    ours = weighted_swiglu(gate_up, gates)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours, (gate_up, gates), gradient),
        torch.autograd.grad(expected, (gate_up, gates), gradient),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "gates_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["fp32", "bf16 with wide gates", "bf16"],
)
def test_weighted_swiglu_rounds_as_the_unfused_form(dtype: torch.dtype, gates_dtype: torch.dtype) -> None:
    """Claim: the same operations in the same order, so that values and gradients are equal to the bit."""
    gate_up, gates, gradient = weighted_case(dtype, gates_dtype, 33)
    ours, theirs = (form(gate_up, gates) for form in (weighted_swiglu, unfused))
    assert ours.dtype == dtype and torch.equal(ours, theirs)
    mine, others = (torch.autograd.grad(y, (gate_up, gates), gradient) for y in (ours, theirs))
    assert mine[1].dtype == gates_dtype
    assert all(torch.equal(*pair) for pair in zip(mine, others, strict=True))


def test_weighted_swiglu_keeps_its_inputs_alone() -> None:
    """Claim: of a pass the two inputs are kept, where the unfused form keeps the products between as well."""
    gate_up, gates, _ = weighted_case(torch.float32, torch.float32, 33)
    kept: dict[str, int] = {}
    for name, form in (("ours", weighted_swiglu), ("unfused", unfused)):
        storages: dict[int, int] = {}

        def note(tensor: Tensor, into: dict[int, int] = storages) -> Tensor:
            into[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            output = form(gate_up, gates)
        kept[name] = sum(storages.values())
        del output
    assert kept["ours"] == gate_up.nbytes + gates.nbytes
    assert kept["unfused"] >= kept["ours"] + 2 * 33 * 17 * 4


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


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"]
)  # fmt: skip
def test_compiled_weighted_swiglu_is_as_exact_as_its_dtype(dtype: torch.dtype, within: float) -> None:
    """Claim: against float64 on the same inputs, values and gradients differ by rounding at the end alone.

    That is 2e-6 of a number's size and 2e-6 in float32, for sums of 17 products too, and half a unit in the last place,
    2^-8, in bf16, of which the unfused form needs several. Other numbers of tokens take the same kernels.
    Blind spot: compiled for the CPU, by another backend than Triton.
    """
    if (lacks := installed().compiler) is not None:
        pytest.skip(lacks)
    graphs = []
    for tokens in (33, 5, 64):
        gate_up, gates, gradient = weighted_case(dtype, torch.float32, tokens)
        wide_up, wide_gates = (one.detach().double().requires_grad_() for one in (gate_up, gates))
        wide = unfused(wide_up, wide_gates)
        ours = weighted_swiglu(gate_up, gates, compiled=True)
        mine = (ours, *torch.autograd.grad(ours, (gate_up, gates), gradient))
        exact = (wide, *torch.autograd.grad(wide, (wide_up, wide_gates), gradient.double()))
        assert [one.dtype for one in mine] == [dtype, dtype, torch.float32]
        for one, wanted in zip(mine, exact, strict=True):
            torch.testing.assert_close(one.double(), wanted, rtol=within if one.dtype == dtype else 2e-6, atol=2e-6)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


def test_one_token_and_none_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: torch would compile each of these sizes by itself, so the plain form takes them."""
    monkeypatch.setattr(torch, "compile", lambda *_args, **_keywords: pytest.fail("compiled"))
    for tokens in (0, 1):
        gate_up, gates, gradient = weighted_case(torch.float32, torch.float32, tokens)
        weighted_swiglu(gate_up, gates, compiled=True).backward(gradient)
