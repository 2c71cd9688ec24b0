"""Upcycling, the names on disk, and the folder's config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from model_providers.moe_discriminator.folder import check_kind_of, read_variant, write_config
from model_providers.moe_discriminator.mapping import (
    SCORE,
    count_parameters,
    dense_name,
    router_name,
    weight_mappings,
)
from model_providers.moe_discriminator.provider import DiscriminatorProvider
from model_providers.moe_discriminator.towers import Towers
from model_providers.moe_discriminator.upcycle import UpcycledSource, keyed_normal
from model_providers.moe_discriminator.variant import Variant
from model_providers.qwen3_vl.mapping import TEXT, dense_mlp_mappings, expert_name
from model_providers.qwen3_vl.mapping import weight_mappings as dense_mappings
from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape
from prism_megatron.config.engine.parallel import ParallelConfig
from prism_megatron.config.presets import preset
from prism_megatron.config.stages.discriminator import Modality
from prism_megatron.conversion.mapping import TensorSource
from prism_megatron.errors import ConfigError, ConversionError

TOWERS = Towers(num_towers=2, experts_per_tower=2, top_k=2)


def config_dict() -> dict[str, Any]:
    return {
        "model_type": "qwen3_vl",
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "text_config": {
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 100,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 32,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "spatial_merge_size": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
        },
    }


SHAPE = Qwen3VLShape.from_dict(config_dict())


class DenseSource(TensorSource):
    """Random tensors for every name of the dense model, in bf16 unless told otherwise."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, *, leave_out: Sequence[str] = ()) -> None:
        torch.manual_seed(0)
        self.tensors: dict[str, Tensor] = {"lm_head.weight": torch.zeros(100, 64, dtype=dtype)}
        for mapping in dense_mappings(SHAPE):
            assert mapping.hf_shapes is not None
            for name, shape in zip(mapping.hf_names, mapping.hf_shapes, strict=True):
                if name not in leave_out:
                    self.tensors[name] = torch.randn(shape).to(dtype)

    def names(self) -> Sequence[str]:
        return list(self.tensors)

    def get(self, name: str) -> Tensor:
        return self.tensors[name]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}


def test_names_and_shapes_are_those_the_model_maps() -> None:
    """The upcycled tensors are exactly the mapped ones, with the mapped shapes; no vocabulary head is left."""
    upcycled = UpcycledSource(DenseSource(), SHAPE, TOWERS, seed=0)
    mapped = {
        name: shape
        for mapping in weight_mappings(SHAPE, TOWERS)
        for name, shape in zip(mapping.hf_names, mapping.hf_shapes or (), strict=True)
    }
    assert upcycled.shapes() == mapped
    assert {name: tuple(upcycled.get(name).shape) for name in upcycled.names()} == mapped
    parameters = [mapping.parameter for mapping in weight_mappings(SHAPE, TOWERS)]
    assert len(parameters) == len(set(parameters))


def test_zero_noise_copies_exactly_and_noise_has_its_size() -> None:
    """Without noise every expert is its dense MLP bit by bit; with it the difference has the asked std."""
    dense = DenseSource(torch.float32)
    exact = UpcycledSource(dense, SHAPE, TOWERS, seed=0, expert_std=0.0)
    noisy = UpcycledSource(dense, SHAPE, TOWERS, seed=0, expert_std=0.01)
    for layer in range(2):
        gate_up, down = dense_mlp_mappings(SHAPE, layer)
        for origin, part in zip((*gate_up.hf_names, *down.hf_names), ("gate", "up", "down"), strict=True):
            for expert in range(4):
                name = expert_name(layer, expert, part)
                assert torch.equal(exact.get(name), dense.get(origin))
                assert float((noisy.get(name) - dense.get(origin)).std()) == pytest.approx(0.01, rel=0.1)
    assert float(noisy.get(router_name(0)).std()) == pytest.approx(0.02, rel=0.2)


def test_noise_depends_on_seed_and_name_alone() -> None:
    """Read twice, in any order, a tensor is the same; another seed, layer or expert draws anew."""
    one, two = (UpcycledSource(DenseSource(), SHAPE, TOWERS, seed=4) for _ in range(2))
    for name in reversed(one.names()):
        assert torch.equal(one.get(name), two.get(name)), name
    other = UpcycledSource(DenseSource(), SHAPE, TOWERS, seed=5)
    assert not torch.equal(one.get(SCORE), other.get(SCORE))
    assert not torch.equal(one.get(expert_name(0, 0, "up")), one.get(expert_name(0, 1, "up")))
    assert not torch.equal(one.get(router_name(0)), one.get(router_name(1)))
    assert one.get(SCORE).dtype == torch.bfloat16


def test_noise_is_added_before_it_is_rounded() -> None:
    """Claim: in bf16 an expert is the float32 sum, rounded once. Noise rounded by itself would give other weights."""
    dense, seed = DenseSource(), 7
    source = UpcycledSource(dense, SHAPE, TOWERS, seed=seed, expert_std=0.01)
    origin = dense.get(dense_name(1, "down"))
    name = expert_name(1, 2, "down")
    noise = keyed_normal(tuple(origin.shape), std=0.01, seed=seed, name=name)
    assert source.get(name).dtype == torch.bfloat16
    assert torch.equal(source.get(name), (origin.float() + noise).bfloat16())
    assert not torch.equal(source.get(name), origin + noise.bfloat16()), "blind: both orders round alike"


def test_rows_are_those_of_the_tensor_that_is_asked_for() -> None:
    """Claim: parts of any tensors, asked for in turns, are parts of the whole ones, whatever readers do to them."""
    source = UpcycledSource(DenseSource(), SHAPE, TOWERS, seed=4)
    names = [expert_name(0, 1, "up"), expert_name(0, 2, "up"), router_name(1), f"{TEXT}.norm.weight"]
    for start, stop in ((0, 1), (1, 4), (0, 4)):
        for name in names:
            rows = source.get_rows(name, start, stop)
            assert torch.equal(rows, source.get(name)[start:stop]), name
    mine = source.get_rows(names[0], 0, 4)
    mine.zero_()
    assert torch.equal(source.get_rows(names[0], 0, 4), source.get(names[0])[:4])


def test_a_model_without_dense_mlps_is_refused() -> None:
    """The error names the tensor that is missing."""
    missing = dense_mlp_mappings(SHAPE, 1)[1].hf_names[0]
    with pytest.raises(ConversionError, match=missing):
        UpcycledSource(DenseSource(leave_out=[missing]), SHAPE, TOWERS, seed=0)


VARIANTS = [
    Variant(TOWERS),
    Variant(Towers(num_towers=1, experts_per_tower=4, top_k=2)),
    Variant(None),
    Variant(TOWERS, "text"),
    Variant(None, "text"),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=Variant.as_flags)
def test_folder_round_trip(tmp_path: Path, variant: Variant) -> None:
    """A provider built from a written folder has the dense sizes and is of the same kind; another kind is refused."""
    dense, saved = tmp_path / "dense", tmp_path / "saved"
    dense.mkdir()
    saved.mkdir()
    (dense / "config.json").write_text(json.dumps(config_dict()))
    write_config(saved, dense_folder=dense, variant=variant)
    assert read_variant(saved) == variant
    provider = DiscriminatorProvider.from_folder(saved)
    assert (provider.shape, provider.towers, provider.modality) == (SHAPE, variant.towers, variant.modality)
    for other in VARIANTS:
        if other != variant:
            with pytest.raises(ConfigError, match=f"use {variant.as_flags()}, or another --discriminator"):
                check_kind_of(saved, other, where="DIR")
    with pytest.raises(ConfigError, match="prism_discriminator"):
        read_variant(dense)


@pytest.mark.parametrize(
    "section",
    [
        {"routing": "segment", "modality": "text", "experts_per_tower": "2", "top_k": 2},
        {"routing": "segment", "modality": "text", "experts_per_tower": 2, "top_k": True},
        {"routing": "segment", "modality": "text"},
        {"routing": "dense", "modality": "text", "experts_per_tower": 2, "top_k": 2},
        {"routing": "other", "modality": "text", "experts_per_tower": 2, "top_k": 2},
        {"routing": "learned", "experts_per_tower": 2, "top_k": 2},
        {"experts_per_tower": 2, "num_towers": 2, "top_k": 2},
    ],
)
def test_a_malformed_section_is_refused(tmp_path: Path, section: dict[str, Any]) -> None:
    """Unknown keys, values and types in the section are named, not guessed around."""
    (tmp_path / "config.json").write_text(json.dumps({"prism_discriminator": section}))
    with pytest.raises(ConfigError, match="expected a routing of"):
        read_variant(tmp_path)


def test_a_vision_tower_that_sees_nothing_is_frozen() -> None:
    """AdamW would shrink weights without a gradient."""
    for modality, frozen in (("text", True), ("multimodal", False)):
        provider = DiscriminatorProvider(SHAPE, TOWERS, modality=cast(Modality, modality))
        assert provider.is_frozen("vision_model.pos_embed.weight") is frozen
        assert not provider.is_frozen("score_head.weight")


@pytest.mark.parametrize("variant", VARIANTS[:3], ids=Variant.as_flags)
def test_counts_are_those_of_the_tensors(variant: Variant) -> None:
    """Claim: every upcycled tensor's numbers, and for a token all of them but the experts it is not sent to."""
    source = UpcycledSource(DenseSource(), SHAPE, variant.towers, seed=0)
    total, per_token = count_parameters(SHAPE, variant.towers)
    assert total == sum(source.get(name).numel() for name in source.names())
    one_expert = sum(source.get(name).numel() for name in source.names() if ".experts.0." in name)
    kept = variant.towers.num_experts - variant.towers.top_k if variant.towers else 0
    assert total - per_token == kept * one_expert


def test_eight_experts_on_the_2b_are_nine_and_a_half_billion_parameters() -> None:
    """The sizes that the documentation states: with the vision tower, and for a token."""
    assert [round(count / 1e9, 1) for count in count_parameters(preset("2B"), Towers())] == [9.5, 3.2]


def test_dense_mlps_are_copied_and_only_the_head_is_fresh() -> None:
    dense = DenseSource(torch.float32)
    source = UpcycledSource(dense, SHAPE, None, seed=3)
    assert set(source.names()) == ({*dense.names(), SCORE} - {"lm_head.weight"})
    assert all(torch.equal(source.get(name), dense.get(name)) for name in source.names() if name != SCORE)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [(ParallelConfig(ep=4), "--ep 4"), (ParallelConfig(tp=2, sp="off"), "--sp off"), (ParallelConfig(tp=3), "--tp 3")],
)
def test_layouts_that_do_not_fit(parallel: ParallelConfig, message: str) -> None:
    """An unfit layout is a ConfigError that names the flag."""
    with pytest.raises(ConfigError, match=message):
        DiscriminatorProvider(SHAPE, TOWERS).transformer_config(parallel, torch.float32)


def test_one_expert_per_token_is_a_config_that_megatron_takes() -> None:
    towers = Towers(top_k=1)
    config = DiscriminatorProvider(SHAPE, towers).transformer_config(ParallelConfig(), torch.float32)
    assert config.moe_router_topk == 1


def test_towers_that_cannot_be() -> None:
    """top-k beyond a tower's experts, and towers without experts, are refused."""
    with pytest.raises(ConfigError, match="--top-k 3"):
        Towers(experts_per_tower=2, top_k=3)
    with pytest.raises(ConfigError, match="--experts-per-tower"):
        Towers(experts_per_tower=0, top_k=1)
