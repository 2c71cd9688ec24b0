"""Sizes come from the config file, in both spellings, and never from a class default."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.parallel import ParallelConfig
from prism_megatron.config.qwen3_vl import Qwen3VLShape
from prism_megatron.errors import ConfigError

HUB: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": True,
    "text_config": {
        "attention_bias": False,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "intermediate_size": 4096,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2048,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
"""The published 2B, with a contradiction inside the text config that must not count."""

SAFE_TO_LEAVE_OUT = {"attention_bias", "hidden_act", "bos_token_id", "dtype", "rope_type", "mrope_interleaved"}
"""Keys that only refuse variants or have another source; ``tie_word_embeddings`` counts at the top level only."""


def changed(path: str, value: Any) -> dict[str, Any]:
    """``HUB`` with one key set, or removed when ``value`` is None."""
    config = copy.deepcopy(HUB)
    *sections, key = path.split(".")
    place = config
    for section in sections:
        place = place[section]
    if value is None:
        del place[key]
    else:
        place[key] = value
    return config


def test_both_spellings_read_the_same() -> None:
    config = copy.deepcopy(HUB)
    text = config["text_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    assert Qwen3VLShape.from_dict(config) == Qwen3VLShape.from_dict(HUB)


def test_the_2b_is_read_right() -> None:
    shape = Qwen3VLShape.from_dict(HUB)
    assert (shape.text.theta, shape.text.mrope_section, shape.text.tied) == (5e6, (24, 20, 20), True)
    assert (shape.eos_token_id, shape.pad_token_id, shape.dtype) == (151645, 151643, "bfloat16")
    assert (shape.vision.patch_dim, shape.vision.grid_side, shape.vision.taps) == (1536, 48, (5, 11, 17))


def test_every_missing_key_is_named() -> None:
    """Claim: no size falls back to a class default."""
    paths = [key for key, value in HUB.items() if not isinstance(value, dict)]
    paths += [f"{section}.{key}" for section in ("text_config", "vision_config") for key in HUB[section]]
    paths += ["text_config.rope_scaling.mrope_section"]
    checked = 0
    for path in paths:
        key = path.rsplit(".", maxsplit=1)[-1]
        if key in SAFE_TO_LEAVE_OUT or path == "text_config.tie_word_embeddings":
            continue
        with pytest.raises(ConfigError, match=key):
            Qwen3VLShape.from_dict(changed(path, None))
        checked += 1
    assert checked == 6 + 11 + 11 + 1  # top level, text, vision, mrope_section: counted by hand, so none is skipped


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "qwen2_vl", "not a Qwen3-VL"),
        ("text_config.hidden_size", "2048", "expected int"),
        ("text_config.hidden_size", True, "expected int"),
        ("text_config.hidden_size", 0, "positive"),
        ("text_config.hidden_size", 1024, "out_hidden_size 2048 must equal"),
        ("text_config.head_dim", 64, "half of head_dim"),
        ("text_config.num_key_value_heads", 5, "multiple of num_key_value_heads"),
        ("text_config.attention_bias", True, "only False is supported"),
        ("text_config.rope_scaling.rope_type", "yarn", "only 'default' is supported"),
        ("text_config.rope_scaling.mrope_section", [24, 20, 19], "must be three counts that add up to half"),
        ("text_config.rope_scaling.mrope_section", [32, 32], "must be three counts that add up to half"),
        ("text_config.num_hidden_layers", 2, "3 DeepStack taps need"),
        ("vision_config.deepstack_visual_indexes", [5, 24], "below depth 24"),
        ("vision_config.deepstack_visual_indexes", [7, 5], "ascend"),
        ("vision_config.num_position_embeddings", 2303, "not a square"),
    ],
)
def test_contradictions_are_refused(path: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Qwen3VLShape.from_dict(changed(path, value))


def test_sizes_at_their_bounds_are_read() -> None:
    """As many layers as taps, a tap in the last block, a token that all experts see."""
    assert Qwen3VLShape.from_dict(changed("text_config.num_hidden_layers", 3)).text.num_layers == 3
    assert Qwen3VLShape.from_dict(changed("vision_config.deepstack_visual_indexes", [5, 23])).vision.taps == (5, 23)
    text = HUB["text_config"] | {"num_experts": 8, "num_experts_per_tok": 8, "moe_intermediate_size": 64}
    sparse = {**HUB, "model_type": "qwen3_vl_moe", "text_config": text}
    assert Qwen3VLShape.from_dict(sparse).text.experts_per_token == 8
    text["num_experts_per_tok"] = 9
    with pytest.raises(ConfigError, match="num_experts_per_tok 9 is more than there are experts"):
        Qwen3VLShape.from_dict(sparse)


def test_what_a_config_says_goes_before_what_stands_beside_it() -> None:
    """Its end token before the generation config's; the rotary base of ``rope_parameters`` before an older one."""
    shape = Qwen3VLShape.from_dict(HUB, generation={"eos_token_id": 9, "pad_token_id": 8})
    assert (shape.eos_token_id, shape.pad_token_id) == (151645, 8)
    config = copy.deepcopy(HUB)
    text = config["text_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": 1e6}
    assert Qwen3VLShape.from_dict(config).text.theta == 1e6


def test_either_name_of_the_number_of_experts_is_read() -> None:
    """Claim: the hub's name, transformers' name, or both where they agree; both that differ are refused."""
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}

    def read(**counts: int | None) -> Qwen3VLShape:
        text = HUB["text_config"] | experts | counts
        return Qwen3VLShape.from_dict({**HUB, "model_type": "qwen3_vl_moe", "text_config": text})

    for counts in ({"num_experts": 8}, {"num_local_experts": 8}, {"num_experts": 8, "num_local_experts": 8}):
        assert read(**counts).text.num_experts == 8
    assert read(num_experts=None, num_local_experts=8).text.num_experts == 8
    with pytest.raises(ConfigError, match="num_experts is 8 but num_local_experts is 4"):
        read(num_experts=8, num_local_experts=4)
    with pytest.raises(ConfigError, match="'num_experts' or 'num_local_experts' is missing"):
        read()


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Qwen3VLShape.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"rms_norm_eps": NaN}')
    with pytest.raises(ConfigError, match="holds NaN, which is not JSON"):
        Qwen3VLShape.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[1")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        Qwen3VLShape.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(changed("text_config.eos_token_id", None)))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9], "pad_token_id": 5}')
    shape = Qwen3VLShape.from_folder(tmp_path)
    assert (shape.eos_token_id, shape.pad_token_id) == (7, 5)


@pytest.mark.parametrize("name", ["2B", "4B", "8B", "32B", "30B-A3B", "235B-A22B"])
def test_published_configs_are_read(name: str, shared_dir: Path) -> None:
    path = shared_dir / "qwen3_vl" / "configs" / f"{name}.json"
    shape = Qwen3VLShape.from_dict(json.loads(path.read_text()), where=str(path))
    assert (shape.text.num_experts > 0) == ("-A" in name)
    assert shape.text.head_dim == 128
    shape.check_layout(ParallelConfig(tp=8))


def test_a_layout_that_does_not_fit_says_what_would() -> None:
    shape = Qwen3VLShape.from_dict(HUB)
    shape.check_layout(ParallelConfig(tp=16, pp=4, vpp=7))
    with pytest.raises(ConfigError, match=r"--tp 3 .* use one of 1, 2, 4, 8 or 16"):
        shape.check_layout(ParallelConfig(tp=3))
    with pytest.raises(ConfigError, match=r"--pp 3 .*28 layers; .*use --pp 1, 2, 4, 7, 14 or 28"):
        shape.check_layout(ParallelConfig(pp=3))
