"""The arithmetic of plans, held to numbers that are worked out by hand and to the formulas of other modules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.engine.rollout import RolloutConfig
from prism_megatron.config.presets import PRESETS, preset
from prism_megatron.engine.host.memory import bytes_of_rank
from prism_megatron.forecast.plays import Case, provider_of
from prism_megatron.observability.model_flops import PEAK_TFLOPS, peak_of
from prism_megatron.planning.build import Batch
from prism_megatron.planning.decoding import decoding, touched
from prism_megatron.planning.disk import disk_of
from prism_megatron.planning.floors import Phase, step_floor
from prism_megatron.planning.gpus import GPUS, gpu_of
from prism_megatron.planning.held import held_by_part, is_frozen, total
from prism_megatron.planning.links import Traffic, _Group, traffic_of_pass
from prism_megatron.planning.paper import paper_run
from prism_megatron.planning.serving import cache_of_a_token, serving_of

H100 = gpu_of("h100-80")


def test_the_table_of_devices_agrees_with_that_of_runs() -> None:
    """Claim: a device has one peak in this project."""
    names = {
        "a100-80": "NVIDIA A100",
        "h100-80": "NVIDIA H100 80GB HBM3",
        "h200-141": "NVIDIA H200",
        "b200-180": "NVIDIA B200",
    }
    assert {device: GPUS[device].bf16_tflops for device in names} == {d: PEAK_TFLOPS[n] for d, n in names.items()}
    assert peak_of("NVIDIA H100 80GB HBM3") == H100.bf16_tflops
    assert all(gpu.source for gpu in GPUS.values())


@pytest.mark.parametrize("model", PRESETS)
def test_parts_are_the_whole(model: str) -> None:
    """Claim: the parts of a model on one stage sum to the formula over all of its weights, to the byte."""
    experts = preset(model).text.num_experts > 0
    layout = ParallelConfig(tp=2, ep=4 if experts else 1, sp="on")
    case = Case("sft", preset(model), layout, world_size=8, freeze=("vision",))
    whole = bytes_of_rank(
        provider_of(case).weight_mappings(), layout, world_size=8, dtype=case.dtype,
        is_frozen=lambda name: is_frozen(case, name),
    )  # fmt: skip
    parts = total(held_by_part(case))
    assert (parts.parameters, parts.gradients) == (whole.parameters, whole.gradients)
    assert parts.optimizer == pytest.approx(whole.optimizer, rel=1e-6)


def test_stages_share_the_layers() -> None:
    """Claim: stages together hold what one holds, and a tied embedding once more, on the last."""
    whole = total(held_by_part(Case("sft", preset("4B"), ParallelConfig()))).parameters
    layout = ParallelConfig(pp=4)
    stages = [held_by_part(Case("sft", preset("4B"), layout, rank=rank, world_size=4)) for rank in range(4)]
    embedding = stages[0]["embedding"].parameters
    assert sum(total(parts).parameters for parts in stages) == whole + embedding
    assert [sorted(parts) for parts in stages] == [
        ["embedding", "layers", "vision"], ["layers"], ["layers"], ["embedding", "head", "layers"]
    ]  # fmt: skip


def test_rings_and_exchanges_by_hand() -> None:
    """Claim: of 16 ranks next to one another, eight to a domain, half of an exchange crosses, and of a sum an eighth
    of a half."""
    group = _Group(16, 1, 8)
    assert group.exchange("e", 1, 160.0) == Traffic("e", 1, 70.0, 80.0)
    assert group.ring("r", 1, 160.0) == Traffic("r", 1, 140.0, 10.0)
    assert _Group(4, 8, 8).ring("r", 2, 80.0) == Traffic("r", 2, 0.0, 120.0), "one rank of it in each domain"
    assert _Group(4, 8, 72).ring("r", 2, 80.0) == Traffic("r", 2, 120.0, 0.0), "all of it in one"


def test_tensor_parallel_layers_sum_twice_each_way() -> None:
    """Claim: a dense layer sums twice forward and twice backward; recomputed once more. A sum is two collectives."""
    case = Case("sft", preset("4B"), ParallelConfig(tp=4, sp="on"), world_size=4)
    names = {one.name: one for one in traffic_of_pass(case, H100, tokens=1000, microbatches=3, learns=True)}
    assert names["tensor parallel"].count == 36 * 3 * 2 * 2 * 2
    assert names["tensor parallel"].nvlink == 36 * 3 * 8 * 1000 * 2560 * 2 * 3 / 4
    full = replace(case, recompute=replace(case.recompute, recompute="full"))
    again = {one.name: one for one in traffic_of_pass(full, H100, tokens=1000, microbatches=3, learns=True)}
    assert again["tensor parallel"].count == 1.5 * names["tensor parallel"].count


def test_a_floor_is_the_highest_roof() -> None:
    """Claim: a phase takes the longest of its roofs, a step the sum of its phases; an empty pipeline counts."""
    compute = Phase("a", flops=989.4e12, hbm=3350e9 / 2, waits=1.5)
    memory = Phase("b", flops=0.0, hbm=3350e9 * 2)
    sent = Phase("c", flops=0.0, hbm=0.0, traffic=(Traffic("x", 1, 450e9, 100e9),))
    assert [phase.floor(H100) for phase in (compute, memory, sent)] == [
        ("compute", 1.5),
        ("HBM", 2.0),
        ("network", 2.0),
    ]
    assert step_floor((compute, memory, sent), H100) == 5.5


def test_keys_and_values_by_hand() -> None:
    """Claim: a token of 4B has 36 layers of 8 heads of 128 keys and values in bf16; over 16 GPUs each has one head."""
    assert cache_of_a_token(preset("4B"), 1) == 2 * 36 * 8 * 128 * 2
    assert cache_of_a_token(preset("4B"), 16) == 2 * 36 * 1 * 128 * 2


def test_servers_apart_have_the_trainers_memory_not() -> None:
    """Claim: colocated servers stand beside what the trainer holds, others do not."""
    case = Case("align", preset("4B"), ParallelConfig(), world_size=8)
    apart, beside = (
        serving_of(RolloutConfig(rollout="sglang", rollout_tp=2, rollout_colocated=colocated), case, resting=10**9,
                   longest=8192)
        for colocated in (False, True)
    )  # fmt: skip
    assert (apart.resting, beside.resting) == (0, 10**9)
    assert apart.sequences(20 * 2**30) > beside.sequences(20 * 2**30) > 0


def test_decoding_reads_all_weights_for_every_token() -> None:
    """Claim: one answer of 100 tokens from one server reads a dense model's weights a hundred times."""
    case = Case("align", preset("4B"), ParallelConfig(), world_size=1)
    batch = Batch(1, 1, 16, 100, None, updates=1, measures=False)
    drawing = decoding(RolloutConfig(rollout="sglang"), case, batch)[1]
    weights = 4_437_815_808 * 2
    assert drawing.hbm == pytest.approx(100 * weights, rel=0.01)
    assert drawing.floor(H100)[0] == "HBM"


def test_few_answers_touch_few_experts() -> None:
    """Claim: one answer's token needs 8 of 128 experts, many answers' all of them."""
    case = Case("align", preset("30B-A3B"), ParallelConfig())
    assert touched(case, 1) < 0.15
    assert touched(case, 10**4) == pytest.approx(1.0)
    assert touched(Case("align", preset("4B"), ParallelConfig()), 1) == 1.0


def test_a_checkpoint_is_weights_and_twelve_bytes_for_each_that_trains() -> None:
    """Claim: RLVR trains all 4.4 billion weights, 14 bytes each; fine-tuning has no state of the tower."""
    rlvr, sft = (disk_of(paper_run(stage, "4B", gpus=8)) for stage in ("rlvr", "sft"))
    assert rlvr.checkpoint["policy"] == pytest.approx(14 * 4.4378e9, rel=0.001)
    assert 12 * 0.40e9 < rlvr.checkpoint["policy"] - sft.checkpoint["policy"] < 12 * 0.43e9
    assert rlvr.kept == 15
