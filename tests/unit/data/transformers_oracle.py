"""What transformers' own classes make of a conversation, and a comparison of ours with it."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from prism_megatron.data.conversation import Conversation, Picture
from prism_megatron.data.pictures.files import open_image
from prism_megatron.data.render import Renderer
from prism_megatron.data.render_conversation import ConversationRenderer, Lengths


class StillProcessor(Qwen3VLProcessor):  # type: ignore[misc]  # transformers has no types
    """transformers' own processor, without the one of videos, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class Oracle:
    """Ids, labels and features by transformers alone; labels by the ids around the assistant's turns."""

    def __init__(self, folder: Path, *, images: Any = None) -> None:
        """``images`` is transformers' image processor; by default the folder's."""
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        load_images: Any = AutoImageProcessor.from_pretrained
        images = images or load_images(folder, local_files_only=True)
        self.processor = StillProcessor(images, self.tokenizer, None, chat_template=self.tokenizer.chat_template)

    def __call__(self, messages: list[dict[str, Any]], **options: Any) -> tuple[list[int], Any]:
        found = self.processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        return found["input_ids"][0], found

    def labels(self, ids: Sequence[int], *, turns: str) -> list[float]:
        start, end = self.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        header = [start, *self.tokenizer("assistant\n", add_special_tokens=False)["input_ids"]]
        begins = [i + len(header) for i in range(len(ids)) if list(ids[i : i + len(header)]) == header]
        mask = [0.0] * len(ids)
        for begin in begins if turns == "all" else begins[-1:]:
            stop = list(ids).index(end, begin) + 1
            mask[begin:stop] = [1.0] * (stop - begin)
        return mask


def messages_of(conversation: Conversation, system_prompt: str | None = None) -> list[dict[str, Any]]:
    """As a user of transformers writes them down."""
    messages: list[dict[str, Any]] = []
    if system_prompt is not None and conversation.turns[0].role != "system":
        messages.append({"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    for turn in conversation.turns:
        content = [
            {"type": "image", "image": opened(part)} if isinstance(part, Picture) else {"type": "text", "text": part}
            for part in turn.parts
        ]
        messages.append({"role": turn.role, "content": content})
    return messages


def opened(picture: Picture) -> Image.Image:
    stored = picture.stored
    return open_image(stored) if isinstance(stored, Path) else Image.open(io.BytesIO(stored))


def assert_equal(
    conversation: Conversation, renderer: Renderer, oracle: Oracle, *, system_prompt: str | None = None
) -> None:
    """Ids, labels of the last turn and of all, lengths, grids and pixels, all of them exactly.

    Labels are not compared where an answer begins with a line end, see ``shares_a_line_end``.
    """
    ids, features = oracle(messages_of(conversation, system_prompt))
    for turns in ("last", "all"):
        render = ConversationRenderer(renderer, label_turns=turns)
        row, mask = render(conversation)
        assert list(row.token_ids) == ids, conversation.id
        if not shares_a_line_end(conversation):
            assert mask == oracle.labels(ids, turns=turns), conversation.id
        visual = row.token_ids.count(renderer.image_token_id)
        assert render.measure(conversation) == Lengths(len(ids) - visual, visual, int(sum(mask)))
    pixels = [image.pixel_values_P_D for image in row.images]
    assert [image.grid_thw for image in row.images] == [tuple(grid) for grid in features.get("image_grid_thw", [])]
    if pixels:
        assert np.array_equal(np.concatenate(pixels), features["pixel_values"]), conversation.id


def shares_a_line_end(conversation: Conversation) -> bool:
    """Whether a tokenizer may join the line end after "assistant" with the white space that an answer begins with."""
    return any(re.match(r"\s*[\r\n]", str(turn.parts[0])) for turn in conversation.turns if turn.role == "assistant")
