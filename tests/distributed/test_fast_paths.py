"""Ways whose kernels need a GPU, by twins of these kernels: the same loss and gradients as the plain way.

What a twin shows is that our layers hand over, and take back, what the kernel takes and gives. Blind spot: the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.engine.host.fast_paths import PLAIN_PATHS, FastPaths
from prism_megatron.testing import GlooWorld
from tests.distributed.fast_path_ranks import Pass, Role, run_pass

PERMUTATION = {"fused_permute_with_probs", "fused_unpermute"}
SORTING = {"fused_sort_chunks_by_index", "fused_sort_chunks_by_index_with_probs"}


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(2) as world:
        yield world


def both(
    gloo: GlooWorld, fast: FastPaths, role: Role, parallel: ParallelConfig, *, apex: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Pass, Pass]:  # fmt: skip
    plain, other = (
        gloo.run(run_pass, one, role, apex, dtype, num_ranks=2, parallel=parallel)[0] for one in (PLAIN_PATHS, fast)
    )
    assert not plain.calls and plain.gradients.keys() == other.gradients.keys()
    return plain, other


def differing(plain: Pass, other: Pass, *, within: float) -> list[str]:
    """Gradients that are further apart than so much of the largest."""
    return [
        name
        for name, wanted in plain.gradients.items()
        if not float((other.gradients[name] - wanted).abs().max()) <= within * float(wanted.abs().max())
    ]


WITH_LINEARS = pytest.mark.parametrize(
    ("role", "parallel"),
    [
        ("dense policy", ParallelConfig(tp=2, sp="on")),
        ("policy with experts", ParallelConfig(ep=2)),
        ("discriminator", ParallelConfig()),
    ],
)


@WITH_LINEARS
def test_fused_weight_gradients_are_added_once(gloo: GlooWorld, role: Role, parallel: ParallelConfig) -> None:
    """Claim: over micro-batches, passes and ranks, in every linear layer; what is no linear layer is added as before.

    To the bit: in float32 the twin adds the same products in the same order. What Megatron returns to autograd in the
    gradient's place is uninitialised memory, so that anything that read it would show.
    """
    plain, other = both(gloo, FastPaths(fuse_weight_gradients=True), role, parallel)
    assert other.calls.keys() == {"wgrad_gemm_accum_fp32"}
    assert other.loss == plain.loss and differing(plain, other, within=0.0) == []


@WITH_LINEARS
def test_a_cpu_adds_weight_gradients_inside_the_product(gloo: GlooWorld, role: Role, parallel: ParallelConfig) -> None:
    """Claim: what apex's kernel does, by torch: within 1e-6 of each gradient's largest, since sums round elsewhere."""
    plain, other = both(gloo, FastPaths(fuse_weight_gradients=True), role, parallel, apex=False)
    assert other.calls["wgrad_gemm_accum_fp32"] > 8
    assert other.loss == plain.loss and differing(plain, other, within=1e-6) == []


@WITH_LINEARS
def test_a_cpu_rounds_weight_gradients_of_bf16_where_it_did(
    gloo: GlooWorld, role: Role, parallel: ParallelConfig
) -> None:
    """Claim: a micro-batch's gradient is rounded before it is added, as without this: equal to the bit."""
    fast = FastPaths(fuse_weight_gradients=True)
    plain, other = both(gloo, fast, role, parallel, apex=False, dtype=torch.bfloat16)
    assert other.calls["wgrad_gemm_accum_fp32"] > 8
    assert other.loss == plain.loss and differing(plain, other, within=0.0) == []


@pytest.mark.parametrize("role", ["policy with experts", "discriminator"])
@pytest.mark.parametrize("parallel", [ParallelConfig(), ParallelConfig(ep=2)], ids=["EP1", "EP2"])
def test_a_fused_permutation_is_handed_what_it_takes(gloo: GlooWorld, role: Role, parallel: ParallelConfig) -> None:
    """Claim: with Megatron's plain permutation as the twin everything is equal to the bit."""
    plain, other = both(gloo, FastPaths(fuse_permutation=True), role, parallel)
    assert other.calls.keys() == PERMUTATION | SORTING
    assert other.loss == plain.loss and differing(plain, other, within=0.0) == []


@pytest.mark.parametrize("role", ["policy with experts", "discriminator"])
def test_a_fused_choice_of_experts_is_the_plain_one(gloo: GlooWorld, role: Role) -> None:
    """Claim: a softmax over the chosen logits, Megatron's plain form as the twin, gives the gates that ours divide.

    Loss and gradients within 1e-5 of the largest: float32 rounds the two forms otherwise. No two logits are equal here.
    """
    plain, other = both(gloo, FastPaths(fuse_router=True), role, ParallelConfig(ep=2))
    assert other.calls.keys() == {"fused_topk_with_score_function"}
    assert other.loss == pytest.approx(plain.loss, rel=1e-6)
    assert differing(plain, other, within=1e-5) == []


@pytest.mark.parametrize("role", ["policy with experts", "discriminator"])
@pytest.mark.parametrize("parallel", [ParallelConfig(ep=2), ParallelConfig(tp=2, etp=2)], ids=["EP2", "ETP2"])
def test_the_flexible_dispatcher_carries_the_same_tokens(gloo: GlooWorld, role: Role, parallel: ParallelConfig) -> None:
    """Claim: with DeepEP's twin, loss and gradients are those of the all-to-all within 1e-5 of the largest.

    Experts' outputs are added in another order. The layer lets go of the graph here too (``run_pass`` looks).
    """
    plain, other = both(gloo, FastPaths(dispatcher="deepep"), role, parallel)
    assert other.calls.keys() == {"fused_dispatch", "fused_combine"}
    assert other.loss == pytest.approx(plain.loss, rel=1e-6)
    assert differing(plain, other, within=1e-5) == []
    assert all(torch.isfinite(gradient).all() for gradient in other.gradients.values())
