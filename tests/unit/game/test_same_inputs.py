"""A discriminator that would read other tokens or patches than the policy is refused; its sizes are its own affair."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.config.experiments.mini_world import MINI_FOLDER
from prism_megatron.errors import ConfigError, DataError
from prism_megatron.game.same_inputs import check_same_inputs

POLICY = MINI_FOLDER / "policy"


def other_patches(document: dict[str, Any]) -> None:
    document["vision_config"]["patch_size"] = 14


def other_merging(document: dict[str, Any]) -> None:
    document["vision_config"]["spatial_merge_size"] = 4


def other_pad(document: dict[str, Any]) -> None:
    document["image_token_id"] = 7


def fewer_tokens(document: dict[str, Any]) -> None:
    document["text_config"]["vocab_size"] = 500


def other_colours(document: dict[str, Any]) -> None:
    document["image_std"] = [0.2, 0.2, 0.2]


def swapped_tokens(document: dict[str, Any]) -> None:
    vocabulary = document["model"]["vocab"]
    first, second = (next(token for token, number in vocabulary.items() if number == wanted) for wanted in (300, 301))
    vocabulary[first], vocabulary[second] = 301, 300


def other_added_token(document: dict[str, Any]) -> None:
    document["added_tokens"][0]["content"] = "<|another|>"


def missing_added_token(document: dict[str, Any]) -> None:
    del document["added_tokens"][2]


@pytest.fixture
def discriminator(tmp_path: Path) -> Path:
    folder = tmp_path / "discriminator"
    shutil.copytree(MINI_FOLDER / "discriminator", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        ("config.json", other_patches, "reads other inputs than the policy: its vision patch is 14, the policy's 16"),
        ("config.json", other_merging, "its vision merge is 4, the policy's 2"),
        ("config.json", other_pad, "its image_token_id is 7, the policy's 498"),
        ("config.json", fewer_tokens, "knows 500 tokens and the policy 512"),
        ("preprocessor_config.json", other_colours, "its image_std is .0.2, 0.2, 0.2., the policy's .0.5, 0.5, 0.5."),
        ("tokenizer.json", swapped_tokens, "has another tokenizer than the policy: token 300 is"),
        ("tokenizer.json", other_added_token, "has another tokenizer than the policy: token .* is '<|another|>' to it"),
        ("tokenizer.json", missing_added_token, "has another tokenizer than the policy: token 488 is None to it"),
    ],
)
def test_other_inputs_are_refused(
    file: str, change: Callable[[dict[str, Any]], None], complaint: str, discriminator: Path
) -> None:
    check_same_inputs(POLICY, discriminator, where="judge")
    document = json.loads((discriminator / file).read_text())
    change(document)
    (discriminator / file).write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=f"--discriminator judge .*{complaint.replace('|', '.')}"):
        check_same_inputs(POLICY, discriminator, where="judge")


def test_a_missing_tokenizer_is_named(discriminator: Path) -> None:
    (discriminator / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist; copy it from the model's"):
        check_same_inputs(POLICY, discriminator, where="judge")


@pytest.mark.parametrize("content", ["{}", '{"model": {"vocab": [1]}, "added_tokens": []}'])
def test_a_file_that_is_no_tokenizer_is_named(content: str, discriminator: Path) -> None:
    (discriminator / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json is no tokenizer of a Qwen3-VL .* copy it from the model's"):
        check_same_inputs(POLICY, discriminator, where="judge")


def test_sizes_may_differ(discriminator: Path) -> None:
    """Layers, widths, heads, rotary base and DeepStack taps are the model's own."""
    document = json.loads((discriminator / "config.json").read_text())
    text = document["text_config"]
    text |= {"num_hidden_layers": 2, "intermediate_size": 99, "rope_theta": 5e6}
    text["rope_scaling"].pop("rope_theta", None)
    document["vision_config"] |= {"depth": 5, "deepstack_visual_indexes": [3]}
    (discriminator / "config.json").write_text(json.dumps(document))
    check_same_inputs(POLICY, discriminator, where="judge")
