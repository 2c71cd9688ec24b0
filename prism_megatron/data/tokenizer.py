"""The mini's tokenizer and image preprocessor as a Hugging Face folder.

Byte-level BPE with Qwen's pre-tokenisation and Qwen's 26 added tokens, trained on texts of scenes. All 256 bytes are
in the vocabulary, so no text is unknown and every text survives a round trip. One difference from Qwen's: no NFC
normalisation, which would break that round trip for text in other normal forms. The few ids that scenes leave over
go to a page of plain English, which nearly halves real questions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from prism_megatron.data.scenes import make_scene
from prism_megatron.data.segments import byte_alphabet, response_text
from prism_megatron.data.teachers import write

MODEL_VOCAB_SIZE = 512
NUM_TRAINING_SCENES = 2000
END_TOKEN = "<|im_end|>"
PAD_TOKEN = "<|endoftext|>"
IMAGE_TOKEN = "<|image_pad|>"

# Qwen3's added tokens in the order of their ids. Control tokens steer the model and never stand for text.
CONTROL_TOKENS = (
    PAD_TOKEN,
    "<|im_start|>",
    END_TOKEN,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    IMAGE_TOKEN,
    "<|video_pad|>",
)
MARKUP_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
# The regular expression of Qwen2Tokenizer in transformers.
PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ASSETS = Path(__file__).parent / "assets"


def train_tokenizer(num_scenes: int = NUM_TRAINING_SCENES) -> Tokenizer:
    """The same arguments give the same vocabulary: ids 0-255 bytes, then merges, then the added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    added = len(CONTROL_TOKENS) + len(MARKUP_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL_VOCAB_SIZE - added,
        initial_alphabet=list(byte_alphabet().values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(num_scenes), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKUP_TOKENS])
    return tokenizer


def save_mini_processing(folder: Path) -> None:
    """Write tokenizer, chat template and image preprocessor where AutoTokenizer and AutoImageProcessor find them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer))
    _write_json(
        folder / "special_tokens_map.json",
        {"additional_special_tokens": list(CONTROL_TOKENS[1:]), "eos_token": END_TOKEN, "pad_token": PAD_TOKEN},
    )
    _write_json(folder / "preprocessor_config.json", PREPROCESSOR_CONFIG)
    template = (ASSETS / "qwen_chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


# Sizes are areas in pixels: a scene (96x96) keeps its size, a photograph shrinks to at most 16 merged patches.
PREPROCESSOR_CONFIG: dict[str, Any] = {
    "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}


def _training_texts(num_scenes: int) -> Iterator[str]:
    """Texts between added tokens: those are never split, so learning to spell them would waste ids."""
    yield (ASSETS / "plain_english.txt").read_text(encoding="utf-8")
    yield "system\n"
    for index in range(num_scenes):
        scene = make_scene("pretrain", seed=0, index=index)
        yield f"user\n{scene.question.text}"
        yield from re.split("</?think>", f"assistant\n{response_text(*write(scene, 'faithful'))}")


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(tokenizer.token_to_id(token)): {"content": token, **flags, "special": token in CONTROL_TOKENS}
        for token in (*CONTROL_TOKENS, *MARKUP_TOKENS)
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(CONTROL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_TOKEN,
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": PAD_TOKEN,
        "processor_class": "Qwen3VLProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
