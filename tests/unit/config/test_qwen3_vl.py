"""Sizes come from the config file, in both spellings, and never from a class default."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.architecture.qwen3_vl import Qwen3VLShape, max_positions
from prism_megatron.config.architecture.rope import in_new_words
from prism_megatron.config.engine.parallel import ParallelConfig
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
    """Its end token before the generation config's."""
    shape = Qwen3VLShape.from_dict(HUB, generation={"eos_token_id": 9, "pad_token_id": 8})
    assert (shape.eos_token_id, shape.pad_token_id) == (151645, 8)


def test_a_pad_id_that_says_none_is_none_and_one_beyond_the_vocabulary_is_refused() -> None:
    assert Qwen3VLShape.from_dict(changed("text_config.pad_token_id", -1)).pad_token_id == 151643
    for path in ("text_config.pad_token_id", "image_token_id"):
        with pytest.raises(ConfigError, match="vocab_size is 151936; correct one of them"):
            Qwen3VLShape.from_dict(changed(path, 151936))


MROPE = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
YARN = {**MROPE, "factor": 4.0, "original_max_position_embeddings": 32768}


def positions(**text: Any) -> dict[str, Any]:
    """``HUB`` with these keys of positions in place of its own; None takes one away."""
    config = copy.deepcopy(HUB)
    config["text_config"] = {key: value for key, value in (config["text_config"] | text).items() if value is not None}
    return config


@pytest.mark.parametrize(
    "text",
    [
        {"rope_scaling": {**MROPE, "type": "default"}},
        {"rope_scaling": {**MROPE, "type": "mrope"}},
        {"rope_scaling": {**MROPE, "type": "mrope", "rope_type": "default"}},
        {"rope_scaling": MROPE},
        {"rope_scaling": {**MROPE, "rope_theta": 5e6}},
        {"rope_scaling": {**MROPE, "rope_theta": 5e6}, "rope_theta": None},
        {"rope_scaling": {}, "rope_parameters": {**MROPE, "rope_theta": 5e6}},
        {"rope_scaling": MROPE, "rope_parameters": {**MROPE, "rope_type": "default", "rope_theta": 5e6}},
        {"partial_rotary_factor": 1.0},
    ],
)
def test_every_spelling_of_plain_positions_reads_the_same(text: dict[str, Any]) -> None:
    """Claim: the kind under either key, the base inside or beside; what is written in new words is read the same."""
    config = positions(**text)
    assert Qwen3VLShape.from_dict(config) == Qwen3VLShape.from_dict(HUB)
    assert Qwen3VLShape.from_dict(in_new_words(config)) == Qwen3VLShape.from_dict(HUB)
    assert '"type"' not in json.dumps(in_new_words(config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"rope_scaling": {**YARN, "type": "yarn"}}, "type is 'yarn'; only 'default' is supported"),
        ({"rope_scaling": {**YARN, "type": "yarn", "rope_type": "default"}}, "type is 'yarn'"),
        ({"rope_scaling": {**MROPE, "type": "linear", "factor": 2.0}}, "type is 'linear'"),
        ({"rope_scaling": {**MROPE, "rope_type": "mrope"}}, "rope_type is 'mrope'"),
        ({"rope_scaling": {**MROPE, "factor": 2.0}}, "factor does not belong to default positions"),
        ({"rope_scaling": {**MROPE, "full_attention": MROPE}}, "full_attention does not belong"),
        ({"rope_scaling": {**MROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {**MROPE, "mrope_interleaved": False}}, "mrope_interleaved is False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {**MROPE, "rope_theta": 1e6}}, "rope_theta is 1000000.0, but 5000000 beside it"),
        ({"rope_theta": 0}, "rope_theta is 0.0, expected a positive number"),
        ({"rope_scaling": None}, "'rope_parameters' or 'rope_scaling' is missing"),
        (
            {"rope_parameters": {**MROPE, "rope_theta": 5e6}, "rope_scaling": {**YARN, "rope_type": "yarn"}},
            "rope_type is 'yarn'",
        ),
        (
            {"rope_parameters": {**MROPE, "rope_theta": 1e6}, "rope_scaling": MROPE, "rope_theta": None},
            "rope_theta' is missing",
        ),
        (
            {"rope_parameters": {**MROPE, "mrope_section": [20, 24, 20]}},
            "rope_parameters .* and rope_scaling .* are two names of one setting, and differ",
        ),
    ],
)
def test_scaled_positions_and_spellings_that_differ_are_refused(text: dict[str, Any], message: str) -> None:
    """Claim: whichever key says so. transformers computes each of these otherwise than plain positions, or not at all,
    or leaves it to the reader which of two is meant."""
    with pytest.raises(ConfigError, match=message):
        Qwen3VLShape.from_dict(positions(**text))


def test_the_cases_of_a_bug_report_are_refused(shared_dir: Path) -> None:
    for name in ("rope_old_key", "rope_two_spellings"):
        text = json.loads((shared_dir / "cases" / f"{name}.json").read_text())
        with pytest.raises(ConfigError, match="type is 'yarn'"):
            Qwen3VLShape.from_dict({**HUB, "text_config": HUB["text_config"] | {"head_dim": 16} | text})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("text_config.is_causal", False, "is_causal is False, which transformers acts on"),
        ("text_config.is_causal", None, "is_causal is None"),
        ("text_config.attention_dropout", 0.1, "attention_dropout is 0.1"),
        ("text_config.layer_types", ["sliding_attention"] * 28, "layer_types is"),
        ("text_config.attribute_map", {"vocab_size": "x"}, "attribute_map is .*; remove it$"),
        ("text_config.num_experts", 8, ""),
        ("vision_config.rope_theta", 77.0, "rope_theta is 77.0; only 10000.0 is supported"),
        ("vision_config.rope_parameters", {"rope_type": "axial", "rope_theta": 10000}, ""),
        ("vision_config.rope_parameters", {"rope_type": "default"}, ""),
        ("vision_config.rope_parameters", {"rope_theta": 77.0}, "rope_theta is 77.0"),
        ("vision_config.rope_scaling", {"type": "linear", "factor": 2.0}, "type is 'linear'"),
        ("vision_config.head_dim", 64, ""),
        ("vision_config.head_dim", 32, "head_dim is 32; only 64 is supported"),
        ("vision_config.num_attention_heads", 16, ""),
        ("vision_config.num_attention_heads", 8, "num_heads is 16 but num_attention_heads is 8"),
        ("vision_config.num_hidden_layers", 12, "depth is 24 but num_hidden_layers is 12"),
        ("vision_config.is_causal", True, "is_causal is True"),
        ("dtype", "float32", ""),
        ("dtype", "foo", "dtype is 'foo', expected one of bfloat16"),
        ("text_config.torch_dtype", "float32", "dtype is 'bfloat16' but torch_dtype is 'float32'"),
        ("configuration_files", ["config.5.0.json"], "configuration_files is"),
        ("transformers_weights", "x.safetensors", "transformers_weights is"),
        ("return_dict", False, "return_dict is False, .*; remove it, or set it to true"),
        ("vocab_size", 151936, ""),
        ("vocab_size", 5, "vocab_size is 5 at the top level"),
        ("rope_scaling", {"type": "yarn"}, "rope_scaling is .* at the top level"),
        ("depth", 5, "depth is 5 at the top level"),
        ("a_key_that_nobody_knows", 5, ""),
    ],
)
def test_keys_that_transformers_acts_on_are_read_or_refused(path: str, value: object, message: str) -> None:
    """Claim: with an empty message what is written is the model as it was, otherwise it is refused by its name.

    An ``is_causal`` that is absent is true to transformers, and null is false.
    """
    config = copy.deepcopy(HUB)
    *sections, key = path.split(".")
    (config[sections[0]] if sections else config)[key] = value
    if message:
        with pytest.raises(ConfigError, match=message):
            Qwen3VLShape.from_dict(config)
    else:
        assert Qwen3VLShape.from_dict(config).text == Qwen3VLShape.from_dict(HUB).text
        assert Qwen3VLShape.from_dict(config).vision == Qwen3VLShape.from_dict(HUB).vision


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
    with pytest.raises(ConfigError, match="NaN is no JSON"):
        Qwen3VLShape.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl", "model_type": "llama"}')
    with pytest.raises(ConfigError, match="key 'model_type' stands twice"):
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


def test_the_longest_sequence_is_read_where_it_is_said() -> None:
    assert max_positions(HUB, "config.json") is None
    assert max_positions(changed("text_config.max_position_embeddings", 4096), "config.json") == 4096
    with pytest.raises(ConfigError, match=r"config.json: text_config: key 'max_position_embeddings' is '4096'"):
        max_positions(changed("text_config.max_position_embeddings", "4096"), "config.json")
