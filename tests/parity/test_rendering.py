"""Ids, labels and pixels of real records equal transformers' own processing.

Oracle: the tokenizer's chat template over the whole conversation, the image processor that AutoImageProcessor picks,
and Qwen3VLProcessor's expansion of the image pad in the *text* (t·h·w // merge² copies), tokenised in one go. Nothing
of it shares code with ``prism_megatron.data``. Ids and pixels must be equal exactly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from prism_megatron.data.pictures.files import open_image
from prism_megatron.data.records import read_records
from prism_megatron.data.render import Renderer

NUM_RECORDS = 100
IGNORED = -100


@pytest.fixture(scope="module")
def qwen(shared_dir: Path) -> tuple[Renderer, Any, Any]:
    folder = shared_dir / "qwen3_vl"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    load_processor: Any = AutoImageProcessor.from_pretrained  # has no type hints
    return Renderer.from_folder(folder), tokenizer, load_processor(folder, local_files_only=True)


def oracle(tokenizer: Any, processor: Any, line: dict[str, Any], image: Path) -> tuple[list[int], list[int], Any]:
    """Ids, labels (-100 outside the assistant's turn) and features of one raw JSON line."""
    question = line["question"]
    for letter, choice in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", line["choices"] or [], strict=False):
        question += f"\n{letter}. {choice}"
    caption, solution = line["caption"] or "none", line["solution"] or "none"
    answer = f"<caption>\n{caption}\n</caption>\n<think>\n{solution}\n</think>\n<answer>{line['answer']}</answer>"
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    features = processor(images=[Image.open(image)], return_tensors="np")
    pads = int(features["image_grid_thw"][0].prod()) // processor.merge_size**2
    texts = [
        tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True),
        tokenizer.apply_chat_template([user, assistant], tokenize=False),
    ]
    prompt, whole = (
        tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * pads), add_special_tokens=False)["input_ids"]
        for text in texts
    )
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[-1:]) == "\n"  # the template's newline after the end token is no label
    whole = whole[:-1]
    return whole, [IGNORED] * len(prompt) + whole[len(prompt) :], features


@pytest.mark.parametrize("name", ["nlvr", "tabmwp", "puzzlevqa", "mathvision_testmini"])
def test_real_records_render_as_transformers_does(name: str, shared_dir: Path, qwen: tuple[Renderer, Any, Any]) -> None:
    """Claim: exact equality for 100 records, evenly spread. Blind spot: missing texts are "none"."""
    renderer, tokenizer, processor = qwen
    folder = shared_dir / "data" / name
    records = read_records(folder, purpose="evaluate")
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert len(records) == len(lines)
    stride = len(lines) // NUM_RECORDS
    for record, line in list(zip(records, lines, strict=True))[::stride][:NUM_RECORDS]:
        prompt = renderer.prompt(record.id, record.question_text, [open_image(record.image)])
        response = renderer.response(record.caption or "none", record.solution or "none", record.answer, id=record.id)
        row, mask = renderer.training_row(prompt, response)
        ids, labels, features = oracle(tokenizer, processor, line, folder / line["image"])
        assert list(row.token_ids) == ids, record.id
        assert [t if m else IGNORED for t, m in zip(row.token_ids, mask, strict=True)] == labels, record.id
        assert row.images[0].grid_thw == tuple(features["image_grid_thw"][0]), record.id
        assert np.array_equal(row.images[0].pixel_values_P_D, features["pixel_values"]), record.id
        sizes = [Image.open(record.image).size]
        assert renderer.num_prompt_tokens(record.id, record.question_text, sizes) == len(prompt.token_ids), record.id
