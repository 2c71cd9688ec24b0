"""The mini's tokenizer: deterministic, no unknown text, short on scenes, loadable by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoImageProcessor

from prism_megatron.data.loader import SceneSource
from prism_megatron.data.render import Renderer
from prism_megatron.data.segments import byte_alphabet
from prism_megatron.data.tokenizer import CONTROL_TOKENS, MARKUP_TOKENS, MODEL_VOCAB_SIZE, train_tokenizer


def test_training_is_deterministic(mini_folder: Path) -> None:
    """Claim: training again gives what the session's folder holds. Blind spot: other versions of tokenizers."""
    assert json.loads((mini_folder / "tokenizer.json").read_text()) == json.loads(train_tokenizer().to_str())


def test_vocabulary_has_all_bytes_and_added_tokens(renderer: Renderer) -> None:
    vocabulary = renderer.tokenizer.get_vocab()
    assert len(vocabulary) <= MODEL_VOCAB_SIZE
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert set(byte_alphabet().values()) <= set(vocabulary)
    assert len(CONTROL_TOKENS) + len(MARKUP_TOKENS) == 26
    for token in (*CONTROL_TOKENS, *MARKUP_TOKENS):
        assert renderer.tokenizer(token)["input_ids"] == [vocabulary[token]]


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text())
def test_any_text_survives_a_round_trip(renderer: Renderer, text: str) -> None:
    assert renderer.decode(renderer.tokenizer(text)["input_ids"]) == text


def test_added_tokens_are_those_of_qwen(shared_dir: Path, renderer: Renderer) -> None:
    """Claim: same 26 tokens, same order, same special flags as the real tokenizer."""
    config = json.loads((shared_dir / "qwen3_vl" / "tokenizer_config.json").read_text())
    real = [(token["content"], token["special"]) for _, token in sorted(config["added_tokens_decoder"].items())]
    ours = [(t.content, t.special) for _, t in sorted(renderer.tokenizer.added_tokens_decoder.items())]
    assert ours == real


def test_scenes_are_short(renderer: Renderer) -> None:
    """Claim: prompts of about 30 tokens (9 of them visual), references of at most 70."""
    examples = SceneSource(renderer, split="align", seed=0, batch_size=200).batch(0)
    prompts = [len(example.prompt.token_ids) for example in examples]
    references = [len(example.reference.token_ids) for example in examples]
    assert sum(prompts) / len(prompts) < 32 and max(prompts) <= 40
    assert max(references) <= 70
    assert all(example.prompt.token_ids.count(renderer.image_token_id) == 9 for example in examples)
    assert all(example.prompt.images[0].grid_thw == (1, 6, 6) for example in examples)


def test_transformers_loads_the_image_processor(mini_folder: Path) -> None:
    load: Any = AutoImageProcessor.from_pretrained  # has no type hints
    processor = load(mini_folder, local_files_only=True)
    assert (processor.patch_size, processor.merge_size, processor.temporal_patch_size) == (16, 2, 2)
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (1024, 16384)


@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json", "preprocessor_config.json"])
def test_folder_is_complete(mini_folder: Path, name: str) -> None:
    assert (mini_folder / name).stat().st_size > 100
