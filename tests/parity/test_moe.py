"""Policies with experts: what the matrix of ``test_qwen3_vl.py`` rests on, their weights, and sharded optimizers.

The oracle is a random ``Qwen3VLMoeForConditionalGeneration`` in float32. Blind spots: CUDA, bf16 beyond the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from prism_megatron.config.parallel import ParallelConfig
from prism_megatron.errors import ConversionError
from prism_megatron.parity.oracle import model_inputs
from prism_megatron.parity.samples import sample_sets
from prism_megatron.parity.tiny import MODELS, tiny_config, tiny_model
from prism_megatron.testing import GlooWorld, RankError
from tests.parity.discriminator_oracle import StateSource
from tests.parity.moe_ranks import load_and_export, one_step
from tests.parity.tiny_batches import shape_of

CONFIG = tiny_config(**MODELS["MoE"])
SHAPE = shape_of(CONFIG)
SMALLEST_GAP = 2e-5
"""Ten times what our router logits may err."""
RELATIVE = 1e-3

LAYOUTS = {
    "TP1": (ParallelConfig(), 1),
    "TP2 (experts too)": (ParallelConfig(tp=2), 2),
    "TP2·ETP1·EP1": (ParallelConfig(tp=2, etp=1), 2),
    "TP2·EP2·ETP2": (ParallelConfig(tp=2, ep=2, etp=2), 4),
    "TP2·EP2·DP2": (ParallelConfig(tp=2, ep=2), 4),
    "ETP2": (ParallelConfig(etp=2), 2),
    "PP2·EP2": (ParallelConfig(pp=2, ep=2), 4),
}


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(4) as world:
        yield world


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tiny_model(CONFIG).state_dict().items()}


def hub_layout(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in weights.items()}


@pytest.mark.parametrize("name", sample_sets())
def test_no_choice_of_experts_is_near_a_tie(name: str) -> None:
    """Claim: over tokens and layers the last chosen expert's logit exceeds the first one left out by far more than
    errors of ours, which are near 2e-6; otherwise rounding alone could choose another expert."""
    model, gaps, top_k = tiny_model(CONFIG), [], SHAPE.text.experts_per_token

    def measure(_module: Any, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        best = output[0].sort(dim=-1, descending=True).values
        gaps.append(float((best[:, top_k - 1] - best[:, top_k]).min()))

    for layer in model.model.language_model.layers:
        layer.mlp.gate.register_forward_hook(measure)
    with torch.no_grad():
        for sample in sample_sets()[name]:
            model(**model_inputs(sample, SHAPE, torch.device("cpu")), use_cache=False)
    print(min(gaps))
    assert min(gaps) > SMALLEST_GAP


@pytest.mark.parametrize("layout", ["TP2·ETP1·EP1", "TP2·EP2·DP2", "ETP2"])
def test_a_sharded_optimizer_steps_as_one_rank_does(gloo: GlooWorld, weights: dict[str, Tensor], layout: str) -> None:
    """One AdamW step with the distributed optimizer: gradient norm, and every weight's change, within 1e-3 relative."""
    parallel, num_ranks = LAYOUTS[layout]
    source = StateSource(weights)
    ((norm, expected),) = gloo.run(one_step, SHAPE, source, num_ranks=1)
    for found_norm, found in gloo.run(one_step, SHAPE, source, parallel=parallel, num_ranks=num_ranks):
        assert found_norm == pytest.approx(norm, rel=RELATIVE)
        for name, before in weights.items():
            change = expected[name] - before
            assert float(change.norm()) > 0
            assert float((found[name] - expected[name]).norm()) < RELATIVE * float(change.norm()), name


@pytest.mark.parametrize("layout", ["TP1", "TP2 (experts too)", "TP2·EP2·ETP2", "PP2·EP2"])
def test_either_layout_of_experts_is_loaded_and_one_is_exported(
    gloo: GlooWorld, weights: dict[str, Tensor], layout: str
) -> None:
    """Bit for bit, every name once, in buckets smaller than a fused tensor and in larger ones, on every rank."""
    parallel, num_ranks = LAYOUTS[layout]
    for stored, bucket_bytes in ((weights, 1000), (hub_layout(weights), 2**30)):
        for exported in gloo.run(
            load_and_export, SHAPE, StateSource(stored), bucket_bytes, parallel=parallel, num_ranks=num_ranks
        ):
            assert sorted(name for name, _ in exported) == sorted(weights)
            assert all(torch.equal(tensor, weights[name]) for name, tensor in exported)


def test_a_broken_folder_is_refused(gloo: GlooWorld, weights: dict[str, Tensor]) -> None:
    """A mixture of layouts, a lost fused tensor and a lost expert are each named before anything is loaded."""
    down = "model.language_model.layers.2.mlp.experts.down_proj"
    one_short = (weights[down].shape[0] - 1, *weights[down].shape[1:])
    for change, message in (
        ({down: weights[down].transpose(1, 2)}, "stored in two layouts"),
        ({down: None}, "weights of the model are missing, first '" + down),
        ({down: weights[down][:-1]}, r"has shape \({}, {}, {}\)".format(*one_short)),
    ):
        stored = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
        with pytest.raises(RankError, match=f"(?s){ConversionError.__name__}.*{message}"):
            gloo.run(load_and_export, SHAPE, StateSource(stored), 1000, num_ranks=1)
