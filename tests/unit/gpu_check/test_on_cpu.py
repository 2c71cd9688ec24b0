"""What the checks measure is right where a CPU can tell, and what is wrong fails them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from prism_megatron.config.presets import preset
from prism_megatron.engine.host.capabilities import Installed
from prism_megatron.engine.host.execution import Execution
from prism_megatron.engine.layers import swiglu
from prism_megatron.engine.offload import Offload
from prism_megatron.gpu_check import attention, works
from prism_megatron.gpu_check.bench import Bench, bench
from prism_megatron.gpu_check.experts import check_experts
from prism_megatron.gpu_check.layer import executions
from prism_megatron.gpu_check.memory import check_memory
from prism_megatron.gpu_check.parity import fp8_rows


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[Bench]:
    with bench(dry=True) as made:
        yield made


@pytest.mark.parametrize("case", attention.cases(6, 4), ids=lambda case: case.name)
def test_who_sees_whom(case: attention.Case) -> None:
    """Claim: a token sees what stands before it in its own answer, and the whole prompt, and no other answer."""
    sees = case.sees(torch.device("cpu"))
    if len(case.sequences.slots) == 1:
        assert torch.equal(sees, torch.ones(22, 22, dtype=torch.bool).tril())
        return
    for token in range(case.length):
        own = range(token + 1) if token < 6 else [*range(6), *range(6 + (token - 6) // 4 * 4, token + 1)]
        assert sees[token].nonzero().flatten().tolist() == list(own)


@pytest.mark.parametrize("number", [0, 1], ids=["one sequence", "a shared prompt"])
def test_kernels_that_a_cpu_has_are_held_against_float64(on_cpu: Bench, number: int) -> None:
    """Claim: ours, with gradients, and torch's flexible one forward come within the limit; what is missing is named."""
    case = attention.cases(8, 4)[number]
    found = {
        name: list(attention._compared(on_cpu, case, name, make))
        for name, make in attention.kernels(on_cpu, case).items()
    }
    assert [row.verdict for row in found["ours"]] == ["holds"] * len(attention.PARTS)
    assert [row.verdict for row in found["flex"]] == ["holds", "skipped"]
    if number == 0:
        assert [row.verdict for row in found["torch flash_attention"]] == ["holds"] * len(attention.PARTS)
        assert [row.note for row in found["flash-attn"]] == ["flash-attn needs CUDA"]
        assert [row.verdict for row in found["torch cudnn_attention"]] == ["skipped"]


def test_a_kernel_that_sees_too_much_fails(on_cpu: Bench) -> None:
    """Claim: one token too many is beyond the limit, in the output and in every gradient but that of values."""
    case = attention.cases(8, 4)[0]

    def seeing_all(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, enable_gqa=True)

    rows = list(attention._compared(on_cpu, case, "wrong", lambda: seeing_all))
    assert [row.verdict for row in rows] == ["FAILS"] * len(attention.PARTS)


def test_a_kernel_that_raises_fails(on_cpu: Bench) -> None:
    """Claim: only a kernel of torch's that says it is not for this device is skipped."""

    def broken(*_tensors: Tensor) -> Tensor:
        raise RuntimeError("an illegal memory access")

    (row,) = attention._compared(on_cpu, attention.cases(8, 4)[0], "torch flash_attention", lambda: broken)
    assert (row.verdict, row.note) == ("FAILS", "an illegal memory access")


def test_flops_of_a_layer_are_torchs_count(on_cpu: Bench) -> None:
    """Claim: of its matrix products as torch counts them; attention is added by half, since it is causal."""
    tokens = 4
    with FlopCounterMode(display=False) as counter:
        works.matrix_products(torch.float32, tokens=tokens, device=on_cpu.device)()
    text = preset(works.PRESET).text
    pairs = tokens**2 / 2
    assert works.layer_flops(tokens) == counter.get_total_flops() + 3 * 4 * pairs * text.heads * text.head_dim


def test_the_output_layer_is_compared_with_all_logits(on_cpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the chunked head gives the plain one's loss and gradients; an entropy that is left out shows."""
    published = preset(works.PRESET)
    small = dataclasses.replace(published, text=dataclasses.replace(published.text, hidden=32, vocab=77))
    monkeypatch.setattr(works, "preset", lambda _name: small)
    made = works.head(on_cpu.world, torch.float32, tokens=9)
    assert works.spread(made.chunked(), made.plain()) < 1e-5
    blind = dataclasses.replace(made, factors_2_1_L=made.factors_2_1_L * torch.tensor([1.0, 0.0]).view(2, 1, 1))
    assert works.spread(made.chunked(), blind.plain()) > 1e-2


def test_what_runs_where(on_cpu: Bench) -> None:
    """Claim: FP8 recipes are tried where the device has them, and what is missing is named otherwise."""
    assert [why for *_, why in executions(on_cpu)] == ["", *["Transformer Engine is not installed"] * 5]
    hopper = Installed("2.13.0", compute_capability=(9, 0), transformer_engine="2.20.0")
    made = executions(dataclasses.replace(on_cpu, machine=hopper))
    assert {name: why for name, _, why in made} == {
        "torch": "",
        "Transformer Engine": "",
        "FP8 delayed": "",
        "FP8 tensorwise": "",
        "FP8 blockwise": "",
        "FP8 mxfp8": "needs compute capability 10.0",
    }
    assert {execution.layers for _, execution, _ in made[1:]} == {"te"}
    assert [execution.precision.fp8_recipe for _, execution, _ in made[2:]] == [
        "delayed", "tensorwise", "blockwise", "mxfp8",
    ]  # fmt: skip
    on_cpu_with_te = Installed("2.13.0", transformer_engine="2.20.0")
    assert (
        executions(dataclasses.replace(on_cpu, machine=on_cpu_with_te))[1][2] == "Transformer Engine runs on CUDA alone"
    )


def test_fp8_is_bounded_by_what_bf16_does(on_cpu: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: layers in bf16 are far within FP8's bounds, which a wrong model is beyond; rows are padded as asked."""
    multiples = []
    of_samples = fp8_rows.__globals__["run_samples"]

    def noted(*arguments: object, **settings: object) -> object:
        multiples.append(settings["multiple_of"])
        return of_samples(*arguments, **settings)

    monkeypatch.setitem(fp8_rows.__globals__, "run_samples", noted)
    logits, gradients = fp8_rows(on_cpu, tmp_path / "good", "bf16", Execution())
    assert (logits.verdict, gradients.verdict) == ("holds", "holds")
    for row in (logits, gradients):
        assert row.value is not None and row.limit is not None and row.value < row.limit / 8
        assert row.limit < 1.0, "what is zeros, or has nothing to do with the model, is at least 1 away"
    assert multiples == [1]


def test_a_role_that_rests_goes_on_as_one_that_stays(on_cpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: equal weights hold; an optimizer whose state does not come back fails."""
    assert [row.verdict for row in check_memory(on_cpu)] == ["skipped", "holds"]
    wait = Offload.wait

    def forgetful(self: Offload) -> None:
        for tensor, _ in self._waiting:
            tensor.zero_()
        wait(self)

    monkeypatch.setattr(Offload, "wait", forgetful)
    assert [row.verdict for row in check_memory(on_cpu)] == ["skipped", "FAILS"]


def test_faster_ways_of_experts_are_held_to_the_plain_ones(on_cpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the way that a CPU has holds, the others are skipped by name, and a wrong kernel fails.

    What would be compiled is called as it is.
    """
    monkeypatch.setattr(swiglu, "_compiled", lambda function: function)
    compiled, timed, *others = check_experts(on_cpu)
    assert (compiled.verdict, timed.verdict) == ("holds", "measured") and compiled.value is not None
    assert 0 < compiled.value < 1e-2, "another form, which rounds otherwise"
    assert [row.verdict for row in others] == ["skipped"] * 3
    assert {row.note for row in others} == {"it needs Transformer Engine and a CUDA device"}
    wrong = swiglu._wide_gradients
    monkeypatch.setattr(swiglu, "_wide_gradients", lambda *given: (wrong(*given)[0], 1.1 * wrong(*given)[1]))
    assert next(check_experts(on_cpu)).verdict == "FAILS"
