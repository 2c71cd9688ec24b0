"""What a CPU has in the place of apex's kernel, beside the product in float64."""

from __future__ import annotations

import pytest
import torch

from prism_megatron.engine.host.weight_gradients import ROWS, WeightGradientsOnCpu


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, 0.0), (torch.bfloat16, 2.0**-8)],
    ids=["fp32", "bf16"],
)
@pytest.mark.parametrize("rows", [7, ROWS, 2 * ROWS + 3])
def test_every_row_gets_its_gradient_once(rows: int, dtype: torch.dtype, rounding: float) -> None:
    """Claim: the product is added to what is there, whatever the number of rows.

    Within what 41 sums round in float32, whatever their order, and what bf16 rounds a product.
    """
    generator = torch.Generator().manual_seed(rows)
    inputs, grads = (torch.randn(40, size, generator=generator).to(dtype) for size in (24, rows))
    before = torch.randn(rows, 24, generator=generator)
    product = grads.double().t() @ inputs.double()
    summed = before.double().abs() + grads.double().t().abs() @ inputs.double().abs()
    total = before.clone()
    WeightGradientsOnCpu.wgrad_gemm_accum_fp32(inputs, grads, total)
    allowed = 41 * 2.0**-24 * summed + rounding * product.abs()
    assert bool(((total.double() - before.double() - product).abs() <= allowed).all())
