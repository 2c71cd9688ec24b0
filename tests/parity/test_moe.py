"""Policies with experts: what the matrix of ``test_qwen3_vl.py`` rests on, their weights, and sharded optimizers.

The oracle is a random ``Qwen3VLMoeForConditionalGeneration`` in float32. Blind spots: CUDA, bf16 beyond the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.conversion.expert_layout import ExpertLayout
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


def in_layout(weights: dict[str, Tensor], layout: ExpertLayout) -> dict[str, Tensor]:
    """Weights of transformers 5 as ``layout`` stores them, written out by hand."""
    stored = {}
    for name, tensor in weights.items():
        if layout == "transformers" or ".experts." not in name:
            stored[name] = tensor
        elif layout == "hub":
            stored[name] = tensor.transpose(1, 2).contiguous()
        else:
            prefix, kind = name.rsplit(".", 1)
            for expert, matrix in enumerate(tensor):
                parts = ("gate", "up") if kind == "gate_up_proj" else ("down",)
                for part, piece in zip(parts, matrix.chunk(len(parts)), strict=True):
                    stored[f"{prefix}.{expert}.{part}_proj.weight"] = piece.contiguous()
    return stored


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
    """One AdamW step with the distributed optimizer: every whole gradient, their norm and every weight's change,
    within 1e-3 relative."""
    parallel, num_ranks = LAYOUTS[layout]
    source = StateSource(weights)
    (expected,) = gloo.run(one_step, SHAPE, source, num_ranks=1)
    for found in gloo.run(one_step, SHAPE, source, parallel=parallel, num_ranks=num_ranks):
        assert found.norm == pytest.approx(expected.norm, rel=RELATIVE)
        for name, before in weights.items():
            gradient, change = expected.gradients[name], expected.weights[name] - before
            assert float(change.norm()) > 0
            assert float((found.gradients[name] - gradient).norm()) < RELATIVE * float(gradient.norm()), name
            assert float((found.weights[name] - expected.weights[name]).norm()) < RELATIVE * float(change.norm()), name


@pytest.mark.parametrize("layout", ["TP1", "TP2 (experts too)", "TP2·EP2·ETP2", "PP2·EP2"])
def test_experts_are_exported_as_they_were_loaded_or_as_asked(
    gloo: GlooWorld, weights: dict[str, Tensor], layout: str
) -> None:
    """Bit for bit, every name once, in buckets smaller than a fused tensor and in larger ones, on every rank."""
    parallel, num_ranks = LAYOUTS[layout]
    of: dict[ExpertLayout, dict[str, Tensor]] = {name: in_layout(weights, name) for name in get_args(ExpertLayout)}
    cases: list[tuple[ExpertLayout, int, list[ExpertLayout | None]]] = [
        ("transformers", 1000, [None]),
        ("hub", 2**30, [None]),
        ("per_expert", 1000, [None, "hub", "transformers"]),
    ]
    for stored, bucket_bytes, asked in cases:
        source = StateSource(of[stored])
        for exports in gloo.run(
            load_and_export, SHAPE, source, bucket_bytes, asked, parallel=parallel, num_ranks=num_ranks
        ):
            for wanted, exported in zip(asked, exports, strict=True):
                expected = of[wanted or stored]
                assert sorted(name for name, _ in exported) == sorted(expected)
                assert all(torch.equal(tensor, expected[name]) for name, tensor in exported)


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
            gloo.run(load_and_export, SHAPE, StateSource(stored), 1000, [None], num_ranks=1)
