"""What all sides of ``benchmarks/sft.py`` train: models of random weights, and records with images of 128 x 128 pixels.

Records are written as ShareGPT lines, a form that is read as it stands by everyone. Without real data they are scenes
of the mini world, and texts are spelled by the mini's tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from prism_megatron.data.records import read_records
from prism_megatron.data.scenes import make_scene
from prism_megatron.data.segments import response_text
from prism_megatron.data.teachers import write
from prism_megatron.data.tokenizer import save_mini_processing

VOCABULARY = 4096
MERGES = 3800
"""Of the published tokenizer's merges: with 256 bytes and 26 added tokens they leave 14 rows of the vocabulary free."""
SIDE = 128
NUM_RECORDS = 200
NUM_VARIED = 1000
# The end of the last turn, after which the published template puts a line break. TRL would learn that one too.
_TURN_END = "{{- '<|im_end|>\\n' }}"
_LAST_TURN_END = "{{- '<|im_end|>' if loop.last and message.role == 'assistant' else '<|im_end|>\\n' }}"


@dataclass(frozen=True)
class Size:
    """Widths and depths of a model."""

    hidden: int
    layers: int
    head_dim: int
    ffn: int
    vision_hidden: int
    vision_ffn: int
    mrope_section: tuple[int, int, int]


SIZES: Mapping[str, Size] = {
    "tiny": Size(128, 4, 16, 256, 64, 128, (4, 2, 2)),
    "31M": Size(512, 6, 64, 1536, 256, 1024, (12, 10, 10)),
}


def write_model(folder: Path, size: Size) -> int:
    """A Hugging Face folder of random weights beside the tokenizer that is there already; how many weights it has."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {f"{name}_token_id": tokenizer.token_to_id(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    ids |= {f"{name}_token_id": tokenizer.token_to_id(f"<|{name}_pad|>") for name in ("image", "video")}
    pad, end = (tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": size.hidden,
            "intermediate_size": size.ffn,
            "num_hidden_layers": size.layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": size.head_dim,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True,
                                "mrope_section": list(size.mrope_section)},
            "tie_word_embeddings": True,
            "pad_token_id": pad,
            "eos_token_id": end,
        },
        vision_config={
            "depth": 4,
            "hidden_size": size.vision_hidden,
            "num_heads": 4,
            "intermediate_size": size.vision_ffn,
            "out_hidden_size": size.hidden,
            "deepstack_visual_indexes": [0, 1, 2],
            "num_position_embeddings": 256,
        },
        tie_word_embeddings=True,
        **ids,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(config).float()
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def write_processing(folder: Path, published: Path | None) -> None:
    """Tokenizer, template and processors: those of the ``published`` folder cut down, or the mini's."""
    folder.mkdir(parents=True)
    if published is None:
        save_mini_processing(folder)
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    else:
        _cut_tokenizer(published, folder)
        template = (published / "chat_template.jinja").read_text(encoding="utf-8")
    head, at, rest = template.partition("{%- for message in messages %}")
    assert _TURN_END in rest
    (folder / "chat_template.jinja").write_text(head + at + rest.replace(_TURN_END, _LAST_TURN_END), encoding="utf-8")
    for kind, short in (("Image", "preprocessor"), ("Video", "video_preprocessor")):
        settings = {
            # Areas in pixels: pictures keep their size.
            "size": {"shortest_edge": 32 * 32, "longest_edge": SIDE * SIDE},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "processor_class": "Qwen3VLProcessor",
            **({"image_processor_type": "Qwen2VLImageProcessorFast"} if kind == "Image"
               else {"video_processor_type": "Qwen3VLVideoProcessor"}),
        }  # fmt: skip
        _write_json(folder / f"{short}_config.json", settings)


def _cut_tokenizer(published: Path, folder: Path) -> None:
    whole = json.loads((published / "tokenizer.json").read_text(encoding="utf-8"))
    model = whole["model"]
    kept = 256 + MERGES
    model["merges"] = model["merges"][:MERGES]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < kept}
    for number, token in enumerate(whole["added_tokens"]):
        token["id"] = kept + number
    _write_json(folder / "tokenizer.json", whole)
    settings = json.loads((published / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    settings["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in whole["added_tokens"]
    }
    _write_json(folder / "tokenizer_config.json", settings)


def write_records(folder: Path, real: Path | None) -> Path:
    """``records.jsonl`` beside its images."""
    (folder / "images").mkdir(parents=True)
    with (folder / "records.jsonl").open("w", encoding="utf-8") as file:
        for number, (image, question, answer) in enumerate(_scenes() if real is None else _real(real)):
            path = f"images/{number}.png"
            image.convert("RGB").resize((SIDE, SIDE)).save(folder / path)
            messages = [
                {"role": "user", "content": f"<image>{question}"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"id": str(number), "messages": messages, "images": [path]}) + "\n")
    return folder / "records.jsonl"


def _real(folder: Path) -> Iterator[tuple[Image.Image, str, str]]:
    for record in read_records(folder, purpose="train")[:NUM_RECORDS]:
        yield Image.open(record.image), record.question_text, f"{record.solution}\n<answer>{record.answer}</answer>"


def _scenes() -> Iterator[tuple[Image.Image, str, str]]:
    for number in range(NUM_RECORDS):
        scene = make_scene("sft", seed=0, index=number)
        yield scene.image(), scene.question.text, response_text(*write(scene, "faithful"))


def write_varied_records(folder: Path) -> Path:
    """Scenes in many sizes with answers of lognormal length, where there are no real sets to take lengths from."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    with (folder / "varied.jsonl").open("w", encoding="utf-8") as file:
        for number in range(NUM_VARIED):
            scene, path = make_scene("sft", seed=1, index=number), f"images/{number}.png"
            width, height = rng.integers(2, 13, 2) * 32
            scene.image().resize((int(width), int(height))).save(folder / path)
            said = response_text(*write(scene, "faithful"))
            length = int(np.clip(rng.lognormal(5.5, 0.8), 20, 2500))
            answer = (said * (1 + length // len(said)))[:length].replace("<", " ").replace(">", " ")
            messages = [
                {"role": "user", "content": f"<image>{scene.question.text}"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"id": str(number), "messages": messages, "images": [path]}) + "\n")
    return folder / "varied.jsonl"


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
