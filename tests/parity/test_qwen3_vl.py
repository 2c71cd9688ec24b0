"""Claim: ours is the same model as transformers' Qwen3-VL, forward and backward, in every layout.

The oracle is a random ``Qwen3VLForConditionalGeneration`` on the CPU, run sample by sample without padding, with
weights large enough that each part matters (logits of about ±3.6). Tolerances in float32: logits 2e-4 absolute; every
parameter's gradient 1e-3 relative to its norm (measured: 5e-6 and 3e-6); in bf16: twice transformers' own error against
float32. ``make parity`` runs every model in every layout; here each layout runs once. What a cell must notice stands in
``tests/defects/qwen3_vl.toml``. Blind spot: CUDA.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.recompute import RecomputeConfig
from prism_megatron.parity.compare import FP32, difference
from prism_megatron.parity.matrix import (
    BF16_LAYOUTS,
    FULL,
    LAYOUTS,
    PACKINGS,
    RECOMPUTES,
    SELECTIVE,
    SETS,
    VISION,
    Bench,
    Block,
    Packing,
    RecomputeCell,
    measure,
    measure_recompute,
    num_ranks,
    reason_against,
    recompute_cells,
)
from prism_megatron.parity.oracle import load_transformers, transformers_outcome
from prism_megatron.parity.probe import Sample
from prism_megatron.parity.samples import image, row, sample_sets
from prism_megatron.parity.table import cell_line, recompute_line
from prism_megatron.parity.tiny import MODELS, prepare, tiny_config, tiny_model
from prism_megatron.testing import GlooWorld
from tests.parity.qwen3_vl_ranks import forward_counts, outcome_of, payload_rows

TIED, UNTIED, MOE = MODELS
CASES = [
    *((TIED, layout) for layout, parallel in LAYOUTS.items() if parallel.ep == 1 and parallel.etp is None),
    *((UNTIED, layout) for layout in ("TP2·SP", "PP2·VPP2", "TP2·PP2·CP2")),
    *((MOE, layout) for layout in ("TP1", "TP2·SP", "PP2", "CP2", "EP2", "TP2·EP2", "ETP2")),
]


@pytest.fixture(scope="module")
def gloo() -> Iterator[GlooWorld]:
    with GlooWorld(8) as world:
        yield world


@pytest.fixture(scope="module")
def bench(gloo: GlooWorld, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    """The processes and the named model, prepared once."""
    made: dict[str, Bench] = {}

    def of(model: str) -> Bench:
        if model not in made:
            folder = tmp_path_factory.mktemp("parity") / model
            made[model] = Bench(gloo.run, {model: folder}, {model: prepare(model, folder)}, list(LAYOUTS))
        return made[model]

    return of


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_logits_and_every_gradient_equal_transformers(model: str, layout: str, bench: Callable[[str], Bench]) -> None:
    """Claim: for all sample sets, padded and packed; replicated weights get equal gradients on every rank."""
    measured = bench(model)
    assert not reason_against(measured.shapes[model], layout)
    cells = measured.measure(Block(model, layout))
    print("\n".join(map(cell_line, cells)))
    assert len(cells) == len(PACKINGS) * len(sample_sets())
    assert all(cell.ok for cell in cells)


@pytest.mark.parametrize("layout", BF16_LAYOUTS)
def test_bf16_errs_no_more_than_twice_as_much_as_transformers_does(layout: str, bench: Callable[[str], Bench]) -> None:
    cells = bench(TIED).measure(Block(TIED, layout, sets=("three sizes",), dtype=torch.bfloat16))
    print("\n".join(map(cell_line, cells)))
    assert cells
    assert all(cell.ok for cell in cells)


@pytest.mark.parametrize(
    ("layout", "packing", "recompute"),
    [("TP2·SP", "packed", "full+vision"), ("PP2", "padded", "full+vision"), ("CP2", "packed", "full+vision")],
)
def test_recompute_changes_no_gradient(
    layout: str, packing: Packing, recompute: str, bench: Callable[[str], Bench], gloo: GlooWorld
) -> None:
    """Claim: to 1e-5 of each gradient's norm (measured: 0). ``make parity`` does it once per layout and model."""
    cell = RecomputeCell(TIED, layout, packing, "three sizes", recompute)
    folder = bench(TIED).folders[TIED]
    result = gloo.run(measure_recompute, folder, cell, parallel=LAYOUTS[layout], num_ranks=num_ranks(layout))[0]
    print(recompute_line(result))
    assert result.worst[0], "nothing was measured"
    assert result.ok


def test_recompute_runs_what_it_names_twice_and_nothing_else(bench: Callable[[str], Bench], gloo: GlooWorld) -> None:
    """Claim: the flags do recompute, each its own parts; else the test above would compare equal runs."""
    folder = bench(TIED).folders[TIED]
    once, *recomputed = (
        gloo.run(forward_counts, folder, recompute, num_ranks=1)[0]
        for recompute in (RecomputeConfig(), FULL, VISION, SELECTIVE, RecomputeConfig("selective"))
    )
    twice = [{name for name in once if counts[name] == 2 * once[name]} for counts in recomputed]
    unchanged = [{name for name in once if counts[name] == once[name]} for counts in recomputed]
    assert twice == [
        {"layer", "attention core", "mlp"},
        {"vision block"},
        {"attention core", "mlp"},
        {"attention core"},
    ]
    assert all(one | other == once.keys() for one, other in zip(twice, unchanged, strict=True))


def test_the_recompute_table_meets_every_pair(bench: Callable[[str], Bench]) -> None:
    """Claim: at most 40 cells, in which each kind of recompute meets both packings and every sample set."""
    shape = bench(TIED).shapes[TIED]
    cells = list(recompute_cells({"one": shape, "two": shape, "three": shape}, list(LAYOUTS)))
    assert len(cells) <= 40
    assert {(cell.recompute, cell.packing) for cell in cells} == set(itertools.product(RECOMPUTES, PACKINGS))
    assert {(cell.recompute, cell.samples) for cell in cells} == set(itertools.product(RECOMPUTES, SETS))


def test_taps_travel_only_as_far_as_their_layer(bench: Callable[[str], Bench], gloo: GlooWorld) -> None:
    """Claim: at PP4 the payload shrinks by one tap's rows per stage, to the bare hidden states (counted in rows)."""
    folder = bench(TIED).folders[TIED]
    shape = Qwen3VLShape.from_folder(folder)
    samples = sample_sets()["three sizes"]
    lengths = gloo.run(payload_rows, folder, samples, parallel=LAYOUTS["PP4"], num_ranks=4)
    last = [sample.row for sample in samples[2:]]  # the second of two micro-batches
    num_tokens = sum(len(row.token_ids) for row in last)
    num_visual = sum(row.token_ids.count(shape.image_token_id) for row in last)
    assert lengths == [num_tokens + taps * num_visual for taps in (2, 1, 0, 0)]


def test_samples_without_images_give_zero_vision_gradients(bench: Callable[[str], Bench], gloo: GlooWorld) -> None:
    """Claim: they are zeros, not missing, so ranks with and without images reduce the same buffers."""
    text_only = sample_sets()["no image on one rank"][1:]
    assert not any(sample.row.images for sample in text_only)
    (outcome,) = gloo.run(outcome_of, bench(UNTIED).folders[UNTIED], text_only, num_ranks=1)
    vision = {name: gradient for name, gradient in outcome.gradients.items() if name.startswith("model.visual.")}
    assert vision
    assert all(float(gradient.abs().max()) == 0.0 for gradient in vision.values())


def test_payloads_of_one_size_are_not_mixed_up_under_virtual_stages(tmp_path: Path) -> None:
    """Claim: at PP2·VPP2 no activation is taken for a gradient. Payloads of one size would hide that from gloo (taps of
    different sizes would deadlock instead), so this model has no taps and its micro-batches are alike."""
    tiny_model(tiny_config(taps=())).save_pretrained(tmp_path)
    shape = Qwen3VLShape.from_folder(tmp_path)
    samples = sample_sets()["one image"][:1] * 4
    oracle = load_transformers(tmp_path, shape, dtype=torch.float32, device=torch.device("cpu"))
    expected = transformers_outcome(oracle, samples, shape)
    with GlooWorld(2) as two:
        found = two.run(outcome_of, tmp_path, samples, len(samples), parallel=LAYOUTS["PP2·VPP2"])[0]
    assert difference(found, expected).within(FP32)


def test_ranks_without_an_image_enter_every_collective(bench: Callable[[str], Bench]) -> None:
    """Claim: no rank waits for one that has no image to share. (The matrix runs this set in every layout; here a wait
    ends early.)"""
    block = Block(TIED, "CP2", packings=("padded",), sets=("no image on one rank",))
    with GlooWorld(2, timeout_s=25.0) as two:
        (cell,) = two.run(measure, bench(TIED).folders[TIED], block, parallel=LAYOUTS["CP2"])[0]
    assert cell.ok


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_context_parallel_ranks_share_images_without_changing_a_gradient(
    num_images: int, bench: Callable[[str], Bench], gloo: GlooWorld
) -> None:
    """Claim: with 0, 1 and 3 images over 1, 2 and 4 ranks every vision gradient is the same to 1e-5 of its norm."""
    rng = np.random.default_rng(num_images)
    images = [image(rng, grid) for grid in ((1, 4, 4), (1, 8, 8), (1, 2, 6))[:num_images]]
    samples = [Sample(0, row(rng, 9, *images, 7))]
    folder = bench(TIED).folders[TIED]
    alone, *shared = (
        gloo.run(outcome_of, folder, samples, parallel=ParallelConfig(cp=cp), num_ranks=cp)[0].gradients
        for cp in (1, 2, 4)
    )
    for gradients in shared:
        for name in (name for name in alone if name.startswith("model.visual.")):
            if num_images == 0:
                assert float(gradients[name].abs().max()) == 0.0, name
            else:
                assert float(alone[name].norm()) > 0.0, name
                assert float((gradients[name] - alone[name]).norm()) <= 1e-5 * float(alone[name].norm()), name
