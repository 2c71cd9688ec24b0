"""Layouts that cannot work are refused in one line with the values that would do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import DiscriminatorLayoutConfig, ParallelConfig
from prism_megatron.config.engine.validate_layout import check_layout, check_world, smallest_world
from prism_megatron.errors import ConfigError

ENDS = (
    "or give the ends their own --first-stage-layers and --last-stage-layers (the stages between share the rest "
    "evenly, each stage a multiple of "
)


def check(parallel: ParallelConfig, shape: Qwen3VLShape) -> None:
    check_layout(parallel, shape, experts_per_tower=4)


@pytest.mark.parametrize(
    ("parallel", "complaint"),
    [
        (
            ParallelConfig(tp=3),
            (
                "--tp 3 does not divide the model (4 key/value heads, 8 attention heads, 160 ffn width, "
                "4 vision heads, 160 vision ffn width); use one of 1, 2 or 4"
            ),
        ),
        (
            ParallelConfig(tp=4, pp=3),
            "--pp 3 --vpp 1 does not divide the model's 4 layers; at --vpp 1 use --pp 1, 2 or 4, " + ENDS + "--vpp 1)",
        ),
        (
            ParallelConfig(pp=2, vpp=4),
            "--pp 2 --vpp 4 does not divide the model's 4 layers; at --vpp 4 use --pp 1, " + ENDS + "--vpp 4)",
        ),
        (ParallelConfig(vpp=2), "--vpp 2 interleaves pipeline stages and needs --pp of at least 2; use --vpp 1"),
        (
            ParallelConfig(cp=4, tp=2, cp_comm="a2a"),
            (
                "--cp 4 --cp-comm a2a gives each rank a share of the heads, but a tensor-parallel rank has 4 of them "
                "with 2 key/value heads; use --cp-comm all_gather or a --cp that divides 2"
            ),
        ),
        (
            ParallelConfig(ep=3),
            "--ep 3 must divide the 4 experts of a tower, so that every rank holds its share of both; use 1, 2 or 4",
        ),
    ],
)
def test_layout_is_refused_by_flag_reason_and_remedy(
    parallel: ParallelConfig, complaint: str, mini: Qwen3VLShape
) -> None:
    with pytest.raises(ConfigError) as caught:
        check(parallel, mini)
    assert str(caught.value) == complaint


@pytest.mark.parametrize(
    ("num_layers", "parallel", "expected"),
    [
        (36, ParallelConfig(pp=4), (9, 9, 9, 9)),
        (94, ParallelConfig(pp=4, first_stage_layers=23, last_stage_layers=23), (23, 24, 24, 23)),
        (94, ParallelConfig(pp=4, first_stage_layers=22, last_stage_layers=24, vpp=2), (22, 24, 24, 24)),
        (7, ParallelConfig(pp=2, first_stage_layers=3), (3, 4)),
        (7, ParallelConfig(pp=2, first_stage_layers=3, last_stage_layers=4), (3, 4)),
    ],
)
def test_layers_of_stages(num_layers: int, parallel: ParallelConfig, expected: tuple[int, ...]) -> None:
    assert parallel.stage_layers(num_layers) == expected


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(pp=4),
        ParallelConfig(pp=4, first_stage_layers=23),
        ParallelConfig(pp=4, first_stage_layers=0, last_stage_layers=31),
        ParallelConfig(pp=4, first_stage_layers=23, last_stage_layers=23, vpp=2),
        ParallelConfig(pp=2, first_stage_layers=40, last_stage_layers=40),
        ParallelConfig(first_stage_layers=94),
    ],
)
def test_stages_that_do_not_add_up_are_refused_by_flag(parallel: ParallelConfig) -> None:
    with pytest.raises(ConfigError, match="--first-stage-layers and --last-stage-layers"):
        parallel.stage_layers(94)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_layouts_that_fit_pass(tp: int, pp: int, ep: int, mini: Qwen3VLShape) -> None:
    check(ParallelConfig(tp=tp, pp=pp, ep=ep), mini)


def test_every_value_the_message_offers_passes(mini: Qwen3VLShape) -> None:
    """Claim: the advice works, also when the narrowest count is not the first. Blind spot: only the vision heads."""
    narrow = dataclasses.replace(mini, vision=dataclasses.replace(mini.vision, heads=2))
    with pytest.raises(ConfigError, match=r"--tp 4 does not divide the model .* use one of 1 or 2"):
        check(ParallelConfig(tp=4), narrow)
    for tp in (1, 2):
        check(ParallelConfig(tp=tp), narrow)


def test_sp_off_is_refused_where_experts_need_it(mini: Qwen3VLShape) -> None:
    check(ParallelConfig(tp=1, sp="off"), mini)
    with pytest.raises(ConfigError, match=r"--sp off cannot work at --tp 2: .* use --sp auto or on"):
        check(ParallelConfig(tp=2, sp="off"), mini)


def test_dense_model_refuses_ep_and_allows_sp_off(mini: Qwen3VLShape) -> None:
    check_layout(ParallelConfig(tp=2, sp="off"), mini, experts_per_tower=0)
    with pytest.raises(ConfigError, match="--ep 2 needs a model with experts"):
        check_layout(ParallelConfig(ep=2), mini, experts_per_tower=0)
    with pytest.raises(ConfigError, match="--etp 2 needs a model with experts"):
        check_layout(ParallelConfig(etp=2), mini, experts_per_tower=0)


@pytest.fixture
def with_experts(mini: Qwen3VLShape) -> Qwen3VLShape:
    """The mini as a policy with 128 experts."""
    return dataclasses.replace(
        mini, text=dataclasses.replace(mini.text, num_experts=128, experts_per_token=8, expert_ffn=64)
    )


@pytest.mark.parametrize(("ep", "its_own"), [(1, 1), (2, 2), (8, 4), (64, 4), (3, 1)])
def test_beside_experts_a_tower_is_split_as_far_as_it_goes(ep: int, its_own: int) -> None:
    """Claim: of 4 experts a tower; beside a dense policy --ep is the discriminator's, as it stands."""
    parallel = ParallelConfig(tp=2, ep=ep)
    own = DiscriminatorLayoutConfig()
    assert own.of(parallel, experts_per_tower=4, beside_experts=True) == dataclasses.replace(parallel, ep=its_own)
    assert own.of(parallel, experts_per_tower=4, beside_experts=False) == parallel
    asked = DiscriminatorLayoutConfig(discriminator_ep=2, discriminator_etp=2)
    assert asked.of(parallel, experts_per_tower=4, beside_experts=True) == dataclasses.replace(parallel, ep=2, etp=2)


def test_a_layout_of_its_own_is_checked_by_its_flags(mini: Qwen3VLShape, with_experts: Qwen3VLShape) -> None:
    def looked_at(shape: Qwen3VLShape, parallel: ParallelConfig, experts: int = 4, **own: int) -> None:
        check_layout(
            parallel, shape, experts_per_tower=experts, discriminator=mini if shape is with_experts else None,
            discriminator_layout=DiscriminatorLayoutConfig(**own),
        )  # fmt: skip

    looked_at(with_experts, ParallelConfig(ep=8))
    looked_at(with_experts, ParallelConfig(ep=8), discriminator_ep=2)
    with pytest.raises(ConfigError, match=r"--discriminator-ep 8 must divide the 4 experts of a tower"):
        looked_at(with_experts, ParallelConfig(ep=8), discriminator_ep=8)
    with pytest.raises(ConfigError, match=r"and this one has none: --ep and --etp are the discriminator's"):
        looked_at(mini, ParallelConfig(), discriminator_ep=2)
    with pytest.raises(ConfigError, match="and there are none; leave them out"):
        looked_at(with_experts, ParallelConfig(ep=8), experts=0, discriminator_ep=2)
    with pytest.raises(ConfigError, match=r"the discriminator: --etp 7 cuts every expert over 7 ranks"):
        looked_at(with_experts, ParallelConfig(ep=8), discriminator_etp=7)


def test_ranks_are_held_against_both_layouts() -> None:
    """Claim: the smallest world fits both, and a smaller one is refused by the flag that it does not fit."""
    parallel, towers = ParallelConfig(ep=2), ParallelConfig(ep=4, etp=2)
    assert smallest_world(parallel, towers) == 8
    assert check_world(parallel, 8, towers=towers) == 8
    with pytest.raises(ConfigError, match=r"--discriminator-ep 4 --discriminator-etp 2 must divide the 4 processes .* "
                                          r"use --discriminator-ep 1 or 2"):  # fmt: skip
        check_world(parallel, 4, towers=towers)


@pytest.mark.parametrize("size", ["2B", "4B", "8B", "32B"])
def test_published_models_fit_the_usual_layouts(size: str, shared_dir: Path) -> None:
    generation = json.loads((shared_dir / "qwen3_vl" / "generation_config.json").read_text())
    config = json.loads((shared_dir / "qwen3_vl" / "configs" / f"{size}.json").read_text())
    shape = Qwen3VLShape.from_dict(config, generation=generation)
    for tp in (1, 2, 4, 8):
        check(ParallelConfig(tp=tp, pp=4), shape)
    with pytest.raises(ConfigError, match="--tp 3 does not divide the model"):
        check(ParallelConfig(tp=3), shape)


def test_world_must_hold_whole_copies() -> None:
    assert check_world(ParallelConfig(tp=2, pp=2), 8) == 2
    assert check_world(ParallelConfig(tp=2, ep=4), 4) == 2
    assert check_world(ParallelConfig(tp=2, cp=3), 12) == 2
    assert check_world(ParallelConfig(tp=2, pp=2, ep=3), 12) == 3
    with pytest.raises(ConfigError, match="takes a multiple of 8 processes, not 12; start 8 or 16"):
        check_world(ParallelConfig(tp=4, pp=2), 12)
    with pytest.raises(ConfigError, match="takes a multiple of 8 processes, not 2; start 8"):
        check_world(ParallelConfig(tp=4, pp=2), 2)
    with pytest.raises(ConfigError, match=r"--ep 4 --etp 1 must divide the 2 processes .* use --ep 1 or 2"):
        check_world(ParallelConfig(ep=4), 2)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("cp", [1, 3])
@pytest.mark.parametrize("ep", [1, 3, 4])
def test_smallest_world_passes_and_is_smallest(tp: int, pp: int, cp: int, ep: int) -> None:
    parallel = ParallelConfig(tp=tp, pp=pp, cp=cp, ep=ep)
    size = smallest_world(parallel)
    check_world(parallel, size)
    for smaller in range(1, size):
        with pytest.raises(ConfigError):
            check_world(parallel, smaller)
