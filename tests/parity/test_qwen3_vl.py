"""Claim: ours is the same model as transformers' Qwen3-VL, forward and backward, in every layout.

The oracle is a random ``Qwen3VLForConditionalGeneration`` in float32 on the CPU with weights large enough that each
part matters (logits of about ±3.6). Tolerances: logits 2e-4 absolute; every parameter's gradient 1e-3 relative to its
norm. Measured: 6e-6 and 3e-6. Blind spots: bf16, CUDA, context parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from prism_megatron.config.parallel import ParallelConfig
from prism_megatron.testing import GlooWorld
from tests.parity.qwen3_vl_oracle import Oracle, real_tokens, tiny_batch, tiny_config, transformers_oracle
from tests.parity.qwen3_vl_ranks import gathered, hf_gradients, replica_spread, run_broken, run_cases

LOGITS_ATOL = 2e-4
GRADIENT_RTOL = 1e-3
CASES = ("images", "shared", "text", "video")
"""Micro-batches: three image sizes, rows that share an image, no image at all, and a video."""

MODELS = {
    # All of the first three layers take a tap; tied, with a vocabulary that no tp divides.
    "tied-3-taps": tiny_config(taps=(0, 1, 2), tied=True, vocab=301),
    "untied-2-taps": tiny_config(taps=(0, 1), tied=False),
}
LAYOUTS = {
    "TP1": ParallelConfig(),
    "TP2": ParallelConfig(tp=2),
    "TP2·SP": ParallelConfig(tp=2, sp="on"),
    "TP8 (more ranks than kv heads)": ParallelConfig(tp=8),
    "PP2": ParallelConfig(pp=2),
    "PP4 (one layer a stage)": ParallelConfig(pp=4),
    "TP4·PP2": ParallelConfig(tp=4, pp=2),
    "PP2·VPP2": ParallelConfig(pp=2, vpp=2),
    "TP2·SP·PP2·VPP2": ParallelConfig(tp=2, pp=2, vpp=2, sp="on"),
}


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(8) as world:
        yield world


@pytest.fixture(scope="module")
def oracles() -> dict[str, list[Oracle]]:
    return {name: [transformers_oracle(config, case) for case in CASES] for name, config in MODELS.items()}


def logits_error(ours: list[Tensor], oracles: list[Oracle]) -> float:
    """Largest absolute difference on real tokens, over all cases."""
    worst = 0.0
    for case, logits, oracle in zip(CASES, ours, oracles, strict=True):
        real = real_tokens(tiny_batch(case))
        worst = max(worst, float((logits[:, : real.shape[1]] - oracle.logits)[real].abs().max()))
    return worst


def gradient_error(ours: dict[str, Tensor], oracles: list[Oracle]) -> tuple[float, str]:
    """The worst parameter's gradient error, relative to its norm, and its name. Gradients add over cases."""
    expected = {name: sum((o.gradients[name] for o in oracles), torch.tensor(0.0)) for name in oracles[0].gradients}
    assert ours.keys() == expected.keys()
    assert all(gradient.norm() > 0 for gradient in expected.values()), "a parameter without gradient proves nothing"
    return max((float((ours[name] - g).norm() / g.norm()), name) for name, g in expected.items())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_every_gradient_equal_transformers(
    layout: str, model: str, gloo: GlooWorld, oracles: dict[str, list[Oracle]]
) -> None:
    config, parallel = MODELS[model], LAYOUTS[layout]
    results = gloo.run(run_cases, config, CASES, parallel=parallel, num_ranks=parallel.model_parallel_size)
    logits = logits_error(gathered(results, config, CASES), oracles[model])
    gradient, worst = gradient_error(hf_gradients(results, config), oracles[model])
    print(f"{layout:32} {model:14} logits {logits:.1e}   gradients {gradient:.1e}  {worst}")
    assert logits < LOGITS_ATOL
    assert gradient < GRADIENT_RTOL, worst
    assert replica_spread(results, config) == 0.0, "replicated weights would drift apart"


def test_taps_travel_only_as_far_as_their_layer(gloo: GlooWorld) -> None:
    """Claim: at PP4 the payload shrinks by one tap's rows per stage, to the bare hidden states (counted in rows)."""
    config, parallel = MODELS["tied-3-taps"], ParallelConfig(pp=4)
    results = gloo.run(run_cases, config, ("images",), parallel=parallel, num_ranks=4)
    batch = tiny_batch("images")
    tokens, num_rows = batch.input_ids_B_S.shape[1], len(batch.lengths_Q)
    num_visual = 4 + 8 + 3 + 4
    expected = [tokens + -(-taps * num_visual // num_rows) for taps in (2, 1, 0)]
    assert [result.payload_rows[0] for result in results[:3]] == expected


def test_a_batch_without_images_gives_zero_vision_gradients(gloo: GlooWorld) -> None:
    """Claim: they are zeros, not missing, so ranks with and without images reduce the same buffers."""
    config = MODELS["untied-2-taps"]
    (result,) = gloo.run(run_cases, config, ("text",), num_ranks=1)
    vision = {name: gradient for name, gradient in result.gradients.items() if name.startswith("vision_model.")}
    assert vision
    assert all(float(gradient.abs().max()) == 0.0 for gradient in vision.values())


@pytest.mark.parametrize(
    ("defect", "parallel"),
    [
        ("no DeepStack", ParallelConfig()),
        ("plain RoPE", ParallelConfig()),
        ("tanh GELU in mergers", ParallelConfig()),
        ("taps sliced under SP", ParallelConfig(tp=2, sp="on")),
        ("shard exported un-gathered", ParallelConfig(tp=2)),
    ],
)
def test_the_comparison_sees_each_defect(
    defect: str, parallel: ParallelConfig, gloo: GlooWorld, oracles: dict[str, list[Oracle]]
) -> None:
    """Claim: with a known defect put back, logits or gradients leave their tolerance (or an export's shape breaks)."""
    model = "tied-3-taps"
    config: dict[str, Any] = MODELS[model]
    results = gloo.run(run_broken, defect, config, CASES, parallel=parallel, num_ranks=parallel.model_parallel_size)
    logits = logits_error(gathered(results, config, CASES), oracles[model])
    if defect == "shard exported un-gathered":
        results = [result for result in results if result.tp_rank == 0]
        with pytest.raises(RuntimeError, match="size of tensor"):
            gradient_error(hf_gradients(results, config), oracles[model])
        return
    gradient, worst = gradient_error(hf_gradients(results, config), oracles[model])
    print(f"{defect:28} logits {logits:.1e}   gradients {gradient:.1e}  {worst}")
    assert logits > LOGITS_ATOL or gradient > GRADIENT_RTOL


def test_batched_p2p_under_vpp_would_be_seen() -> None:
    """Claim: left on at PP2·VPP2 it exchanges activations and gradients. Payloads of one size hide that from gloo
    (taps of different sizes would deadlock instead), so this model has no taps and its micro-batches are alike."""
    config, cases = tiny_config(taps=()), ("images",) * 4
    oracle = transformers_oracle(config, "images")
    real = real_tokens(tiny_batch("images"))
    errors = {}
    with GlooWorld(2, timeout_s=60.0) as two:
        for run, *arguments in ((run_cases,), (run_broken, "batched p2p under VPP")):
            results = two.run(run, *arguments, config, cases, parallel=ParallelConfig(pp=2, vpp=2))
            logits = gathered(results, config, cases)
            errors[run.__name__] = max(float((one - oracle.logits)[real].abs().max()) for one in logits)
    print(errors)
    assert errors["run_cases"] < LOGITS_ATOL < errors["run_broken"]
